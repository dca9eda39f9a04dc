// The backward of one row and head, tile by tile as the forward, with w and its dropout computed again. With p_nm = g_n
// . v_m / keep where kept, else 0: ds_nm = w_nm (p_nm - g_n . o_n), or w_nm (1 - w_nm) p_nm for the sigmoid; dq_n =
// scale sum_m ds_nm k_m, dk_m = scale sum_n ds_nm q_n, dv_m = sum_n kept w_nm g_n / keep.
#pragma once

#include <cmath>

#include "attention/weights.h"

namespace uz::UZ_ISA {

class AttentionGradients {
 public:
  AttentionGradients(const AttentionBackward& b, Arena& arena)
      : b_(b),
        a_(b.forward),
        ldm_(round_up(a_.prefix + a_.length, kLanes)),
        keys_(take_block(arena, a_.prefix + a_.length, a_.k.width)),
        values_(take_block(arena, a_.prefix + a_.length, a_.v.width)),
        keys_turned_(arena.take(round_up(a_.k.width, 4) * ldm_)),
        values_turned_(arena.take(round_up(a_.v.width, 4) * ldm_)),
        dk_(take_block(arena, a_.prefix + a_.length, a_.k.width)),
        dv_(values_),  // the values are no longer needed once they are turned
        dk_prefix_(take_block(arena, a_.prefix, a_.k.width)),
        dv_prefix_(take_block(arena, a_.prefix, a_.v.width)),
        q_(take_block(arena, kQueries, a_.q.width)),
        dq_(take_block(arena, kQueries, a_.q.width)),
        g_(take_block(arena, kQueries, a_.v.width)),
        o_(take_block(arena, kQueries, a_.v.width)),
        scores_(take_block(arena, kQueries, ldm_ < kKeys ? ldm_ : kKeys)),
        p_(take_block(arena, kQueries, ldm_ < kKeys ? ldm_ : kKeys)),
        shift_(arena.take(kQueries)),
        delta_(arena.take(kQueries)),
        drop_(a_.seed, a_.keep) {}

  void run(int64_t item) {
    const Place place(a_, item);
    const int64_t rows = a_.prefix + a_.length;
    drop_.item = static_cast<uint32_t>(item);
    clear(dk_prefix_), clear(dv_prefix_);
    place.walk([&](int64_t first, int64_t n) { document(place, first, n); },
               [&](int64_t first, int64_t n) {
                 place.clear(b_.dq, a_.length, a_.q.width, first, n);
                 place.clear(b_.dk, rows, a_.k.width, a_.prefix + first, n);
                 place.clear(b_.dv, rows, a_.v.width, a_.prefix + first, n);
               });
    place.write(b_.dk, rows, dk_prefix_.data, dk_prefix_.ld, a_.k.width, 0, a_.prefix, key_factor());
    place.write(b_.dv, rows, dv_prefix_.data, dv_prefix_.ld, a_.v.width, 0, a_.prefix, 1.0f);
  }

 private:
  void clear(const Block& x) const {
    __builtin_memset(x.data, 0, static_cast<size_t>(a_.prefix * x.ld) * sizeof(float));
  }

  // The queries of a tile bear scale log2 e, and a minus for the sigmoid.
  float key_factor() const { return static_cast<float>(a_.sigmoid ? -kLn2 : kLn2); }
  float query_factor() const { return static_cast<float>((a_.sigmoid ? -kLog2e : kLog2e) * double(a_.scale)); }
  bool drops() const { return a_.keep < 65536; }

  void document(const Place& place, int64_t first, int64_t n) {
    const int64_t keys = a_.prefix + n, rows = a_.prefix + a_.length;
    place.read_keys(a_.k, first, n, keys_);
    place.read_keys(a_.v, first, n, values_);
    turn(keys_, keys, keys_turned_, ldm_);
    turn(values_, keys, values_turned_, ldm_);
    for (int64_t i = 0; i < n; i += kQueries) {
      const int64_t queries = n - i < kQueries ? n - i : kQueries;
      read_queries(place, first + i, queries, keys);
      for (int64_t key = 0; key < keys; key += kKeys) {
        const Tile t = weigh(queries, key, keys - key < kKeys ? keys - key : kKeys);
        if (keys == 1 && !a_.sigmoid) constant_weights(t);
        i == 0 ? add_keys<false>(t, key) : add_keys<true>(t, key);
        key == 0 ? add_queries<false>(t, key) : add_queries<true>(t, key);
      }
      place.write(b_.dq, a_.length, dq_.data, dq_.ld, a_.q.width, first + i, queries, a_.scale);
    }
    place.write(b_.dk, rows, dk_.row(a_.prefix), dk_.ld, a_.k.width, a_.prefix + first, n, key_factor());
    place.write(b_.dv, rows, dv_.row(a_.prefix), dv_.ld, a_.v.width, a_.prefix + first, n, 1.0f);
    add_prefix(dk_, dk_prefix_), add_prefix(dv_, dv_prefix_);
  }

  void add_prefix(const Block& x, const Block& sum) const {
    for (int64_t i = 0; i < a_.prefix * x.ld; i += kLanes) store(sum.data + i, load(sum.data + i) + load(x.data + i));
  }

  void read_queries(const Place& place, int64_t first, int64_t queries, int64_t keys) {
    const float over_keep = 65536.0f / static_cast<float>(a_.keep);
    drop_.first_query = static_cast<uint32_t>(first);
    place.read(a_.q, first, queries, q_.data, q_.ld, query_factor());
    place.read(b_.grad, first, queries, g_.data, g_.ld);
    if (a_.sigmoid) {
      shift_[0] = static_cast<float>(std::log2(static_cast<double>(keys)));
    } else {
      const int64_t width = a_.v.width, token = a_.heads * width;
      place.read({a_.o, a_.length * token, token, width, width}, first, queries, o_.data, o_.ld);
      const float* lse = place.lse(first);
      for (int64_t r = 0; r < queries; ++r) {
        Vec sum = set1(0.0f);
        for (int64_t j = 0; j < g_.ld; j += kLanes) sum = fma(load(g_.row(r) + j), load(o_.row(r) + j), sum);
        delta_[r] = reduce_add(sum);
        shift_[r] = lse[r];
      }
    }
    if (!drops()) return;
    const Vec times = set1(over_keep);
    for (int64_t j = 0; j < queries * g_.ld; j += kLanes) store(g_.data + j, load(g_.data + j) * times);
  }

  Tile weigh(int64_t queries, int64_t key, int64_t count) {
    const Tile t = {scores_.data, scores_.ld, queries, count};
    drop_.first_key = static_cast<uint32_t>(key);
    gemm<false>({q_.data, q_.ld, 1}, keys_turned_ + key, ldm_, t.data, t.ld, queries, count, a_.q.width, Nothing{});
    gemm<false>({g_.data, g_.ld, 1}, values_turned_ + key, ldm_, p_.data, p_.ld, queries, count, a_.v.width, Nothing{});
    if (a_.sigmoid) {
      drops() ? weight_gradients<true, true>(t, p_.data, drop_, shift_, delta_)
              : weight_gradients<false, true>(t, p_.data, drop_, shift_, delta_);
    } else {
      drops() ? weight_gradients<true, false>(t, p_.data, drop_, shift_, delta_)
              : weight_gradients<false, false>(t, p_.data, drop_, shift_, delta_);
    }
    return t;
  }

  // The softmax of one score is 1 whatever the score: not 0 to within a rounding, but 0.
  void constant_weights(const Tile& t) {
    for (int64_t r = 0; r < t.queries; ++r) *(p_.row(r)) = 0.0f;
  }

  template <bool kAdd>
  void add_keys(const Tile& t, int64_t key) {
    gemm<kAdd>({p_.data, 1, p_.ld}, q_.data, q_.ld, dk_.row(key), dk_.ld, t.keys, a_.k.width, t.queries, Nothing{});
    gemm<kAdd>({t.data, 1, t.ld}, g_.data, g_.ld, dv_.row(key), dv_.ld, t.keys, a_.v.width, t.queries, Nothing{});
  }

  template <bool kAdd>
  void add_queries(const Tile& t, int64_t key) {
    gemm<kAdd>({p_.data, p_.ld, 1}, keys_.row(key), keys_.ld, dq_.data, dq_.ld, t.queries, a_.q.width, t.keys,
               Nothing{});
  }

  const AttentionBackward& b_;
  const Attention& a_;
  const int64_t ldm_;
  Block keys_, values_;
  float *keys_turned_, *values_turned_;
  Block dk_, dv_, dk_prefix_, dv_prefix_, q_, dq_, g_, o_, scores_, p_;
  float *shift_, *delta_;
  Dropping drop_;
};

}  // namespace uz::UZ_ISA
