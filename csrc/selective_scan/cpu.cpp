// Selective scan. One vector holds kLanes channels, registers hold kStates of
// their states; time is cut into chunks of kChunk steps, so that what does not
// depend on the state (dt, dt u, B, C) is computed or converted once per chunk.
// Floor: arithmetic, not traffic: an exp (9 instructions here) and 4
// multiply-adds per state, against 16 bytes per channel and step.
#include "selective_scan/backward.h"
#include "selective_scan/forward.h"

namespace uz::UZ_ISA {
namespace {

constexpr int kMaxStates = UZ_ISA_LEVEL >= 2 ? 16 : 8;

int64_t groups(int64_t dim) { return (dim + kGroup - 1) / kGroup; }

template <template <class, int> class Pass, class T, class Args, class F>
auto with_pass(const Args& args, const SelectiveScan& a, Arena& arena, const F& f) {
  if (kMaxStates > 8 && a.state > 8) {
    Pass<T, kMaxStates> pass(args, arena);
    return f(pass);
  }
  Pass<T, 8> pass(args, arena);
  return f(pass);
}

template <template <class, int> class Pass, class Args>
int64_t floats(const Args& args, const SelectiveScan& a) {
  Arena counter(nullptr);
  return with_pass<Pass, float>(args, a, counter, [&](auto&) { return counter.used(); });
}

template <template <class, int> class Pass, class Args>
void run(const Args& args, const SelectiveScan& a, float* scratch, int64_t begin, int64_t end) {
  visit(a.dtype, [&]<class T>(T) {
    Arena arena(scratch);
    with_pass<Pass, T>(args, a, arena, [&](auto& pass) {
      const int64_t count = groups(a.dim);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t group = item % count, first = group * kGroup;
        pass.run(item / count, group, first, a.dim - first < kGroup ? a.dim - first : kGroup);
      }
    });
  });
}

int64_t forward_floats(const SelectiveScan& a) { return floats<ScanForward>(a, a); }
int64_t backward_floats(const SelectiveScanBackward& b) { return floats<ScanGradients>(b, b.forward); }

void forward(const SelectiveScan& a, float* scratch, int64_t begin, int64_t end) {
  run<ScanForward>(a, a, scratch, begin, end);
}
void backward(const SelectiveScanBackward& b, float* scratch, int64_t begin, int64_t end) {
  run<ScanGradients>(b, b.forward, scratch, begin, end);
}

}  // namespace

const SelectiveScanKernels selective_scan_kernels = {groups, forward_floats, forward, backward_floats, backward};

}  // namespace uz::UZ_ISA
