// The states that enter the chunks: S = sum_m decay^(distance of m to the chunk) x_m y_m^T over the tokens m of the
// chunk's document that lie before it (walking rightwards) or after it (leftwards).
#pragma once

#include "retention/documents.cuh"
#include "retention/mma_states.cuh"

namespace uz::cuda {
namespace {

template <class T>
struct States {
  Layout layout;
  const T *x, *y;  // (batch, length, heads, rows), (batch, length, heads, columns)
  int rows, columns;
  bool vector_x, vector_y;
  float* states;  // (directions, batch * heads, count - 1, rows, stride); the first chunk of a walk has none
  float* totals;  // (directions, batch * heads, spans - 1, tiles, 64 * 64)
  int stride;
  int64_t heads;               // batch * heads
  bool rightwards, leftwards;  // directions, in this order
  int chunks_of_span, spans;   // a walk is cut into spans, each a block's
  int row_tiles, column_tiles;
};

// One block walks over the chunks of a span of one head in one direction, with a tile of 64 x 64 of the state in its
// registers, and loads the next tokens while it adds these. kTotals: it starts from nothing and keeps what leaves
// the span, for the blocks of later spans; otherwise it starts from what leaves the spans before and keeps what enters
// each chunk.
template <class T, bool kTotals>
__global__ void __launch_bounds__(kThreads, kBlocks) retention_states(const States<T> a) {
  using By = Walk<T, kTensorCores<T>>;
  SharedMemory shared;
  float* const power = shared.take<float>(kTile + 1);
  float* const left = shared.take<float>(By::kShared / sizeof(float));
  float* const right = shared.take<float>(By::kShared / sizeof(float));

  const int tiles = a.row_tiles * a.column_tiles, spans = kTotals ? a.spans - 1 : a.spans;
  int64_t block = blockIdx.x;
  const int tile = static_cast<int>(block % tiles);
  block /= tiles;
  const int span = static_cast<int>(block % spans);
  const int64_t walk = block / spans, head_and_row = walk % a.heads;
  const bool leftwards = walk >= a.heads || !a.rightwards;
  const int head = static_cast<int>(head_and_row % a.layout.heads);
  const int first_row = tile / a.column_tiles * kTile, first_column = tile % a.column_tiles * kTile;
  const Row row(a.layout, head_and_row / a.layout.heads);
  const float log_decay = a.layout.log_decay[head];
  set_powers(power, log_decay);
  __syncthreads();

  const int count = a.layout.count, begin = span * a.chunks_of_span;
  const int end = begin + a.chunks_of_span < count ? begin + a.chunks_of_span : count;
  const auto chunk_at = [&](int place) { return leftwards ? count - 1 - place : place; };  // along the walk
  // Whether one document reaches from before the chunks at places from .. to - 1 to their end.
  const auto passes = [&](int from, int to) {
    const int one = chunk_at(from), other = chunk_at(to - 1);
    return leftwards ? row.one_document(row.start(other), row.stop(one) + 1)
                     : row.one_document(row.start(one) - 1, row.stop(other));
  };

  typename By::Sums sums;
  sums.zero();
  // The thread's part of what leaves span s.
  const auto total_of = [&](int s) {
    return reinterpret_cast<float4*>(a.totals) + ((walk * (a.spans - 1) + s) * tiles + tile) * (kTile * kTile / 4) +
           threadIdx.x;
  };
  if constexpr (!kTotals) {
    for (int s = 0; s < span; ++s) {
      const int from = s * a.chunks_of_span, to = from + a.chunks_of_span;
      const int one = chunk_at(from), other = chunk_at(to - 1);
      const int64_t tokens = leftwards ? row.stop(one) - row.start(other) : row.stop(other) - row.start(one);
      if (s > 0 && passes(from, to)) {
        sums.scale(expf(log_decay * static_cast<float>(tokens)));
      } else {
        sums.zero();
      }
      const float4* const total = total_of(s);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float4 x = total[i * kThreads];
        sums.at[i][0] += x.x, sums.at[i][1] += x.y, sums.at[i][2] += x.z, sums.at[i][3] += x.w;
      }
    }
  }

  const int stride_x = a.layout.heads * a.rows, stride_y = a.layout.heads * a.columns;
  const int64_t first_token = head_and_row / a.layout.heads * a.layout.length;
  const T* const x = a.x + first_token * stride_x + head * a.rows;
  const T* const y = a.y + first_token * stride_y + head * a.columns;
  typename By::Side slab_x(left), slab_y(right);
  // The decay from token m of a chunk of n to where the state leaves it.
  const auto weight = [&](int m, int n) { return power[leftwards ? m : n - 1 - m]; };
  // Some tokens of the chunk at `place`, from `token` on, plainly with their weights.
  const auto fetch = [&](int place, int token, int last) {
    const int64_t start = row.start(chunk_at(place));
    const int n = row.tokens(chunk_at(place));
    const Matrix<T> keys = {x + start * stride_x, stride_x, a.rows, a.vector_x};
    const Matrix<T> values = {y + start * stride_y, stride_y, a.columns, a.vector_y};
    if constexpr (kTensorCores<T>) {
      slab_x.fetch(keys, token, first_row, last);
      slab_y.fetch(values, token, first_column, last);
    } else {
      slab_x.fetch(keys, token, first_row, last, [&](int m) { return weight(m, n); });
      slab_y.fetch(values, token, first_column, last, One());
    }
  };
  // The tokens of a chunk whose document reaches its end.
  struct Run {
    int first, last;
  };
  const auto run_at = [&](int place) -> Run {
    const int chunk = chunk_at(place), n = row.tokens(chunk);
    const Borders borders = row.borders(chunk);
    if (leftwards) return {0, row.padding(row.start(chunk)) ? 0 : borders.after(0, n)};
    return {row.padding(row.stop(chunk) - 1) ? n : borders.last(), n};
  };

  const int added = kTotals ? end : end - 1;  // chunks from there on add to no state that is kept
  Run run = {0, 0};
  if (begin < added) run = run_at(begin);
  if (run.first < run.last) fetch(begin, run.first, run.last);
  for (int place = begin; place < end; ++place) {
    if constexpr (!kTotals) {
      const int64_t edge = leftwards ? row.stop(chunk_at(place)) : row.start(chunk_at(place));
      if (row.one_document(edge - 1, edge + 1)) {
        float* const state = a.states + ((walk * (count - 1) + place - 1) * a.rows + first_row) * a.stride;
        if constexpr (kTensorCores<T>) {
          sums.store(state + first_column, a.stride, a.rows - first_row, a.stride - first_column);
        } else {
          sums.store(state + first_column, a.stride, 0, a.rows - first_row, a.columns - first_column, true);
        }
      }
    }
    if (place >= added) break;
    if (passes(place, place + 1)) {
      sums.scale(power[row.tokens(chunk_at(place))]);
    } else {
      sums.zero();
    }
    Run next = {0, 0};
    if (place + 1 < added) next = run_at(place + 1);
    if (run.first == run.last && next.first < next.last) fetch(place + 1, next.first, next.last);
    for (int token = run.first; token < run.last; token += By::kTokens) {
      const auto fetch_next = [&] {
        if (token + By::kTokens < run.last) {
          fetch(place, token + By::kTokens, run.last);
        } else if (next.first < next.last) {
          fetch(place + 1, next.first, next.last);
        }
      };
      if constexpr (kTensorCores<T>) {
        const Bits *const x_now = slab_x.take(), *const y_now = slab_y.take();
        wait_for_copies();
        __syncthreads();  // these tokens are there, and the other half has been used
        fetch_next();
        const int n = row.tokens(chunk_at(place)), depth = run.last - token;
        sums.add(x_now, y_now, depth, a.rows - first_row, a.columns - first_column,
                 [&](int m) { return m < depth ? weight(token + m, n) : 0.0f; });
      } else {
        __syncthreads();
        slab_x.put(left);
        slab_y.put(right);
        __syncthreads();
        fetch_next();
        sums.add(left, right);  // rows beyond the run are 0
      }
    }
    run = next;
  }

  if constexpr (kTotals) {
    float4* const total = total_of(span);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      total[i * kThreads] = make_float4(sums.at[i][0], sums.at[i][1], sums.at[i][2], sums.at[i][3]);
  }
}

}  // namespace
}  // namespace uz::cuda
