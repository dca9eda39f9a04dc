// The calls of a kernel that takes a row's heads one by one, for cpu.cpp files:
//   head_floats<Pass>(args)                             scratch that a thread needs
//   run_heads<Pass>(args, shape, scratch, begin, end)   items begin to end, an item being a row and a head
// Pass<T> is made of args and an Arena and has run(row, head); shape has the dtype of memory, which is T, and heads.
#pragma once

#include "common/arena.h"
#include "common/simd.h"

namespace uz::UZ_ISA {

template <template <class> class Pass, class Args>
int64_t head_floats(const Args& args) {
  Arena counter(nullptr);
  Pass<float>(args, counter);
  return counter.used();
}

template <template <class> class Pass, class Args, class Shape>
void run_heads(const Args& args, const Shape& shape, float* scratch, int64_t begin, int64_t end) {
  visit(shape.dtype, [&]<class T>(T) {
    Arena arena(scratch);
    Pass<T> pass(args, arena);
    for (int64_t item = begin; item < end; ++item) pass.run(item / shape.heads, item % shape.heads);
  });
}

}  // namespace uz::UZ_ISA
