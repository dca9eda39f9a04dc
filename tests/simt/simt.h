// What the stand-in CUDA headers call: one fiber for each thread of a block, all of them on one thread of the CPU.
//
// Kernels compile unchanged. A fiber runs until it has to wait (for a barrier, or for the other lanes of a warp), so
// the order of the threads is ours to choose, and a thread that never comes is seen, not waited for. A mistake ends the
// launch with a text that names the kernel, the block, the thread and the line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// A thread's own, kept by the scheduler.
#define SIMT_OWN extern __thread __attribute__((tls_model("initial-exec")))
SIMT_OWN uint3 threadIdx, blockIdx;
SIMT_OWN dim3 blockDim, gridDim;
#undef SIMT_OWN

namespace simt {

// Where a kernel calls something that waits; the default argument is the line of the call.
struct Site {
  const char* file;
  int line;
};
#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// Ends the launch; does not come back to the kernel.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Waits for every thread of the block; returns how many of them gave `vote`.
int barrier(bool vote, Site site);

enum class WarpOp { sync, index, up, down, exclusive_or, ballot };

struct alignas(16) Bits {
  uint64_t words[2];
};

// Waits for the lanes of `mask`, and returns what the lane that `op` and `lane` pick has brought.
Bits exchange(WarpOp op, unsigned mask, Bits value, int lane, int width, Site site);

// In the random order, lets other threads run first, now and then.
void maybe_yield();

// Piece number `index` of the block's shared memory: each lies apart from the others, between red zones, and is full of
// NaN when the block starts.
void* shared_piece(int index, long long count, size_t size);

class SharedMemory {
 public:
  template <class T>
  T* take(int count) {
    return static_cast<T*>(shared_piece(next_++, count, sizeof(T)));
  }

 private:
  int next_ = 0;
};

// Runs a kernel; returns a cudaError_t, whose text error_text() has.
int run(dim3 blocks, dim3 threads, size_t shared_bytes, const void* kernel, void (*body)(void*), void* arguments);
int allow_shared(const void* kernel, int bytes);
int device_attribute(int attribute, int* value);
const char* error_text(int error);

template <class T>
Bits pack(T value) {
  static_assert(sizeof(T) <= sizeof(Bits) && std::is_trivially_copyable_v<T>);
  Bits bits = {};
  __builtin_memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T unpack(Bits bits) {
  T value;
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt
