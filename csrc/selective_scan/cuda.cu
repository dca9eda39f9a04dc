// The selective scan. Floor of the forward: an exp2 and four multiplications and additions for each number of state and
// step; 16 exp2 per cycle and SM are 2.4e12 a second on an A100 (3.7e12 on an H100), the others keep up. u, delta, z
// and y move once, 16 bytes in fp32 (8 in bf16), and a 32nd of the states. Batch 4, length 1024, dim 384, N 16 in fp32
// is 10 (7) us of exp2 and 29 MB, 19 (9) us. Of the backward: an exp2 and 14, with the sums of dB and dC over the
// channels, 36 (17) us; 28 bytes and the states, 48 MB, 31 (14) us.
//
// Batch x dim alone is too little for a GPU, so the length is cut as well. Kernels that sum chunks up, combine them and
// replay them would take every exp2 and read u and delta twice. Here a block takes a few channels and up to 16 chunks
// of 32 positions at a time, a warp each, and goes through the states one by one: a thread computes the exp2 of its
// steps once, in registers, finds the state that its steps leave if 0 enters, learns through shuffles and shared memory
// what does enter (what a slice does to a state is two numbers, and its decay is one exp2, of the sum of dt), and goes
// through its steps again with multiply-adds alone: 6 instructions a number, not 9, one exp2, not two. The other chunks
// of the row follow in the same block; no block waits for another. All sums are of a fixed order, and what enters a
// chunk does not depend on how many are taken at a time.
//
// Tiles: a warp has 16 channels x 2 slices of 16 steps in the forward, 8 x 4 of 8 in the backward, which keeps six
// numbers a step: the most that fits 128 registers, and so two blocks of 8 warps an SM, or one of 16 where blocks are
// few. Eight channels are one sector of 32 bytes in fp32, half of one in bf16. B and C of 8 states lie in shared memory
// as (state, step): a thread reads four steps at once, no two lanes meet in a bank, and dB and dC take their places, to
// leave in rows. A block of the backward goes through as many sets of 8 channels as leave about kWantedBlocks blocks,
// and adds up their parts of dB and dC where they lie, in the L2 cache.
#include "common/documents.cuh"
#include "selective_scan/backward.cuh"
#include "selective_scan/forward.cuh"

namespace uz::cuda {
namespace {

constexpr int64_t kWantedBlocks = 192;  // of 8 warps: once all that an A100 or H100 holds at a time

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One block walks along a row, with as many chunks at a time as it has warps; fewer blocks have more warps.
int warps_of(const SelectiveScan& a, int64_t blocks) {
  const int64_t chunks = ceil_div(a.length, kChunk), most = blocks < 128 ? kMostWarps : kMostWarps / 2;
  return static_cast<int>(chunks < most ? chunks : most);
}

// Sets of channels that a block of the backward goes through, at least so many that dB and dC in parts take no more
// than four times the memory of u in fp32.
int64_t sets_of(const SelectiveScan& a) {
  const int64_t sets = ceil_div(a.dim, Slice<kBackwardSteps>::kChannels), groups = ceil_div(kWantedBlocks, a.batch);
  const int64_t wanted = ceil_div(sets, groups), least = ceil_div(a.state, 16), each = wanted > least ? wanted : least;
  return sets < each ? sets : each;
}

}  // namespace

Error selective_scan_forward(const SelectiveScan& a, Stream stream) {
  constexpr int kChannels = Slice<kForwardSteps>::kChannels;
  const int64_t blocks = a.length > 0 ? a.batch * ceil_div(a.dim, kChannels) : 0;
  const int warps = warps_of(a, blocks);
  SharedSize size;
  size.add<float>(warps * kTile);
  size.add<float>(warps * kTile);
  size.add<Span>(2 * warps * kChannels);
  size.add<Chunk>(warps);
  if (const Error error = check_documents(a.segments, a.batch, a.length, nullptr, stream)) return error;
  return by_dtype(a.dtype, [&](auto zero) {
    return launch(scan_forward<decltype(zero)>, dim3(static_cast<unsigned>(blocks)), dim3(warps * kWarp), size.bytes,
                  stream, a);
  });
}

int64_t selective_scan_groups(const SelectiveScan& a) {
  if (a.batch == 0 || a.dim == 0) return 0;
  return ceil_div(a.dim, Slice<kBackwardSteps>::kChannels * sets_of(a));
}

Error selective_scan_backward(const SelectiveScanBackward& b, float* carry, Stream stream) {
  constexpr int kChannels = Slice<kBackwardSteps>::kChannels;
  const SelectiveScan& a = b.forward;
  const int64_t groups = selective_scan_groups(a), blocks = a.length > 0 ? a.batch * groups : 0;
  if (blocks == 0) return nullptr;
  const int warps = warps_of(a, blocks);
  SharedSize size;
  size.add<float>(warps * kTile);
  size.add<float>(warps * kTile);
  size.add<Span>(2 * warps * kChannels);
  size.add<float>(kStates * warps * kChannels);
  size.add<float>(2 * warps * kChannels);
  size.add<Chunk>(warps);
  if (const Error error = check_documents(a.segments, a.batch, a.length, nullptr, stream)) return error;
  return by_dtype(a.dtype, [&](auto zero) {
    return launch(scan_backward<decltype(zero)>, dim3(static_cast<unsigned>(blocks)), dim3(warps * kWarp), size.bytes,
                  stream, b, carry, static_cast<int>(groups), static_cast<int>(sets_of(a)));
  });
}

}  // namespace uz::cuda
