// Retention on CUDA, chunkwise. Floor, a token and head: 8 K V flops for the states of both directions (building and
// applying them; causal: 4 K V) and 2 C (K + V) for the pairs within chunks of C tokens; bytes of q, k, v and o. At K
// 64, V 128, C 64 that is 90 kflop against 1.5 kB in fp32, so arithmetic binds: products run on tiles held in registers
// (tile.cuh), 64 tokens by 64 or 128 columns a block of 128 threads, at most 31 KB of shared memory and 128 registers,
// so that three to four blocks fit on an SM (of 16-bit states two, where an SM has 100 KB). fp32 sums throughout.
//
// Inputs of 16 bits go to tensor cores from sm_80 on (mma.cuh): scores by mma.m16n8k16 of the inputs themselves, the
// products with scores and states, which are fp32, by mma.m16n8k8 in tf32: nothing overflows in fp16, and what is
// rounded keeps 11 bits. The same blocks with the same work take 64 tokens at a time by cp.async, in 37 KB (states) and
// 28 KB (output) of shared memory and 128 registers. Floor on an A100, of the 90 kflop, all but the scores at half of
// the rate of 16 bits: 0.55 ns; of the 0.77 kB of q, k, v and o: 0.49 ns; and the states, 1 kB written and 1 kB read:
// 1.3 ns, unless its L2 keeps them. So memory binds. Not timed on a GPU; bench/results/cuda_kernels.md has the model.
//
// Two kernels. retention_states walks along each head with the state in registers, one block for each 64 x 64 part of
// it, and keeps the state that enters each chunk: 4 K V bytes a chunk and direction, written once and read once (131 kB
// a chunk in all at these sizes, beside 98 kB of q, k, v and o). Where heads are few, walks are cut into spans, which
// first sum up their own chunks. retention_output then does the chunks, all of them at once. C is 64, or less where
// chunk_size asks for less: smaller chunks move more states, larger ones cost more pairs.
//
// The gradients are the same op with other arguments: dq = retention(grad, v, k), and, with the directions exchanged,
// dk = retention(v, grad, q) and dv = retention(k, q, grad); the last two read the same states, one of them turned.
// That is 6 C (K + V) + 20 K V flops, 1.08 times those of one fused kernel at these sizes, which would compute each of
// the two kinds of scores once, not three times in all.
#include "common/documents.cuh"
#include "retention/gaps.cuh"
#include "retention/kernels.h"
#include "retention/output.cuh"
#include "retention/states.cuh"

namespace uz::cuda {
namespace {

constexpr int64_t kMostBlocks = 0x7fffffff;  // of a grid; and of the numbers in 64 rows
constexpr int64_t kFewBlocks = 64;           // a walk by no more blocks than these is cut into spans
constexpr int kMostSpans = 16;

int64_t parts(int64_t width) { return (width + kTile - 1) / kTile; }
int64_t padded(int64_t width) { return (width + 3) / 4 * 4; }

template <class T>
bool vector(const void* p, int64_t width) {
  return width % 4 == 0 && reinterpret_cast<uintptr_t>(p) % (4 * sizeof(T)) == 0;
}

int chunk_of(const Retention& a) { return static_cast<int>(a.chunk < kTile ? a.chunk : kTile); }
int64_t chunks_of(const Retention& a) { return (a.length + chunk_of(a) - 1) / chunk_of(a); }

// How the walks of the states are cut up; x is turned into the rows of a state, y into its columns.
struct Spans {
  int64_t chunks, spans;  // of a span; of a walk

  Spans(const Retention& a, int64_t batch, int64_t x, int64_t y) {
    const int64_t count = chunks_of(a), blocks = batch * a.heads * (a.causal ? 1 : 2) * parts(x) * parts(y);
    int64_t most = blocks > kFewBlocks || blocks == 0 ? 1 : 2 * kFewBlocks / blocks;
    if (most > kMostSpans) most = kMostSpans;
    chunks = (count + most - 1) / most;
    spans = (count + chunks - 1) / chunks;
  }
};

// PTX of before sm_80 on a newer device is the plain body, in the memory that is asked for the other one.
static_assert(kOutputLeft + kOutputRight >= (2 * kDepth + kTile) * kLong<1> * sizeof(float), "the plain body fits");

// Whether the device has tensor cores for such inputs; code compiled for it uses them: kTensorCores.
template <class T>
bool by_tensor_cores() {
  int device = 0, major = 0;
  return sizeof(T) == 2 && cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 8;
}

template <class By>
SharedSize states_shared() {
  SharedSize shared;
  shared.add<float>(kTile + 1);
  for (int side = 0; side < 2; ++side) shared.add<float>(By::kShared / sizeof(float));
  return shared;
}

// The op that a launch computes: the inputs in their roles, and which sides of a token it reads.
template <class T>
struct Call {
  const Retention& a;
  int64_t batch;
  float* work;
  int* gaps;  // of each row, or null
  Stream stream;
  bool before, after;

  Layout layout() const {
    return {a.log_decay, a.segments, a.length, static_cast<int>(a.heads), chunk_of(a), static_cast<int>(chunks_of(a))};
  }
  int64_t walks() const { return batch * a.heads * (before + after); }

  Error states(const void* x, int64_t rows, const void* y, int64_t columns) const {
    const Spans spans(a, batch, rows, columns);
    const int64_t stride = padded(columns), tiles = parts(rows) * parts(columns);
    States<T> s = {};
    s.layout = layout();
    if (s.layout.count == 1) return nullptr;
    s.x = static_cast<const T*>(x), s.y = static_cast<const T*>(y);
    s.rows = static_cast<int>(rows), s.columns = static_cast<int>(columns);
    s.vector_x = vector<T>(x, rows), s.vector_y = vector<T>(y, columns);
    s.states = work, s.totals = work + walks() * (s.layout.count - 1) * rows * stride;
    s.stride = static_cast<int>(stride), s.heads = batch * a.heads;
    s.rightwards = before, s.leftwards = after;
    s.chunks_of_span = static_cast<int>(spans.chunks), s.spans = static_cast<int>(spans.spans);
    s.row_tiles = static_cast<int>(parts(rows)), s.column_tiles = static_cast<int>(parts(columns));
    const SharedSize shared = by_tensor_cores<T>() ? states_shared<Walk<T, true>>() : states_shared<Walk<T, false>>();
    if (spans.spans > 1)
      if (const Error error = start(retention_states<T, true>, walks() * (spans.spans - 1) * tiles, shared, s))
        return error;
    return start(retention_states<T, false>, walks() * spans.spans * tiles, shared, s);
  }

  // turned: the states are those of (values, keys).
  Error output(const void* q, const void* k, int64_t key, const void* v, void* o, int64_t value, bool turned) const {
    if (value == 0) return nullptr;
    Output<T> s = {};
    s.layout = layout();
    s.q = static_cast<const T*>(q), s.k = static_cast<const T*>(k), s.v = static_cast<const T*>(v);
    s.o = static_cast<T*>(o);
    s.key = static_cast<int>(key), s.value = static_cast<int>(value);
    s.vector_key = vector<T>(q, key) && vector<T>(k, key);
    s.vector_value = vector<T>(v, value), s.vector_o = vector<T>(o, value);
    s.before = before, s.after = after;
    const int64_t rows = turned ? value : key, stride = padded(turned ? key : value);
    s.states_before = work;
    s.states_after = work + (before ? batch * a.heads * (s.layout.count - 1) * rows * stride : 0);
    s.state_floats = rows * stride, s.stride = static_cast<int>(stride);
    s.vector_state = (turned ? key : value) % 4 == 0;
    const Error error = turned                                   ? output<1, true>(s)
                        : value > kTile && !by_tensor_cores<T>() ? output<2, false>(s)
                                                                 : output<1, false>(s);
    if (error != nullptr || gaps == nullptr) return error;
    return launch(retention_gaps<T>, dim3(static_cast<unsigned>(batch * a.heads)), dim3(kThreads), 0, stream, s, gaps);
  }

 private:
  template <int kParts, bool kTurned>
  Error output(const Output<T>& s) const {
    SharedSize shared;
    shared.add<float>(kTile + 1);
    if (by_tensor_cores<T>()) {
      shared.add<unsigned char>(kOutputLeft);
      shared.add<unsigned char>(kOutputRight);
    } else {
      shared.add<float>(kDepth * kLong<1>);
      shared.add<float>(kDepth * kLong<kParts>);
      shared.add<float>(kTile * kLong<1>);
    }
    return start(retention_output<T, kParts, kTurned>, batch * a.heads * s.layout.count, shared, s);
  }

  template <class Arguments>
  Error start(void (*kernel)(Arguments), int64_t blocks, const SharedSize& shared, const Arguments& arguments) const {
    const int64_t widest = padded(a.key > a.value ? a.key : a.value), most = a.heads > widest ? a.heads : widest;
    if (widest * (most > kTile ? most : kTile) > kMostBlocks / kTile) return "retention: too many heads or columns";
    if (blocks > kMostBlocks) return "retention: more chunks than a grid has blocks; ask for a larger chunk_size";
    return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), shared.bytes, stream, arguments);
  }
};

}  // namespace

int64_t retention_work_floats(const Retention& a, int64_t batch) {
  const auto floats = [&](int64_t x, int64_t y) {
    const int64_t walks = batch * a.heads * (a.causal ? 1 : 2);
    return walks * ((chunks_of(a) - 1) * x * padded(y) +
                    (Spans(a, batch, x, y).spans - 1) * parts(x) * parts(y) * kTile * kTile);
  };
  const int64_t one = floats(a.key, a.value), other = floats(a.value, a.key);
  return one > other ? one : other;
}

Error retention_forward(const Retention& a, int64_t batch, float* work, int* gaps, Stream stream) {
  if (const Error error = check_documents(a.segments, batch, a.length, gaps, stream)) return error;
  return by_dtype(a.dtype, [&](auto type) -> Error {
    const Call<decltype(type)> call = {a, batch, work, gaps, stream, true, !a.causal};
    if (const Error error = call.states(a.k, a.key, a.v, a.value)) return error;
    return call.output(a.q, a.k, a.key, a.v, a.o, a.value, false);
  });
}

Error retention_backward(const RetentionBackward& b, int64_t batch, float* work, int* gaps, Stream stream) {
  const Retention& a = b.forward;
  if (const Error error = check_documents(a.segments, batch, a.length, gaps, stream)) return error;
  return by_dtype(a.dtype, [&](auto type) -> Error {
    const Call<decltype(type)> same = {a, batch, work, gaps, stream, true, !a.causal};
    if (const Error error = same.states(a.v, a.value, a.k, a.key)) return error;
    if (const Error error = same.output(b.grad, a.v, a.value, a.k, b.dq, a.key, false)) return error;
    const Call<decltype(type)> exchanged = {a, batch, work, gaps, stream, !a.causal, true};
    if (const Error error = exchanged.states(a.q, a.key, b.grad, a.value)) return error;
    if (const Error error = exchanged.output(a.k, a.q, a.key, b.grad, b.dv, a.value, false)) return error;
    return exchanged.output(a.v, b.grad, a.value, a.q, b.dk, a.key, true);
  });
}

}  // namespace uz::cuda
