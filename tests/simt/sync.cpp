// Barriers, and exchanges between the lanes of a warp.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "block.h"

namespace simt {

int Block::barrier(bool vote, Site site) {
  Thread& me = *current_;
  me.site = site;
  if (alive_ < count_)
    stop(format("at the barrier %s, but %d of %d threads have ended", describe(site).c_str(), count_ - alive_, count_));
  if (arrived_ == 0) {
    first_arrived_ = &me;
  } else if (first_arrived_->site.line != site.line || std::strcmp(first_arrived_->site.file, site.file) != 0) {
    stop(format("divergent barrier: it is at %s, thread %d at %s", describe(site).c_str(), first_arrived_->number,
                describe(first_arrived_->site).c_str()));
  }
  votes_ += vote;
  char* const sync = &place_->barriers[generation_ % 2];
  release(sync);
  if (++arrived_ == alive_) {
    open_barrier();
    me.state = State::ready;
    if (settings.order == Order::random) wait(State::ready);
  } else {
    wait(State::at_barrier);
  }
  acquire(sync);
  return me.votes;
}

void Block::open_barrier() {
  for (Thread& thread : all_) thread.votes = votes_, thread.state = State::ready;
  arrived_ = votes_ = 0;
  ++generation_;
}

Bits Block::exchange(WarpOp op, unsigned mask, Bits value, int lane, int width, Site site) {
  Thread& me = *current_;
  me.site = site, me.op = op, me.mask = mask, me.brought = value, me.asked = lane, me.width = width;
  const std::string at = "warp operation at " + describe(site);
  if (!(mask >> me.lane & 1)) stop(format("%s: its own mask %08x leaves it out", at.c_str(), mask));
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0) stop(format("%s: width %d", at.c_str(), width));
  bool complete_now = true;
  for (int i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1) || i == me.lane) continue;
    const int number = me.warp * kWarp + i;
    if (number >= count_) stop(format("%s: mask %08x names lane %d, which has no thread", at.c_str(), mask, i));
    const Thread& other = all_[number];
    if (other.state == State::done)
      stop(format("%s: mask %08x names lane %d, whose thread has ended", at.c_str(), mask, i));
    if (other.state != State::in_warp) {
      complete_now = false;
    } else if (other.op != op || other.mask != mask || other.site.line != site.line) {
      stop(format("divergent warp: it is at %s with mask %08x, lane %d at %s with mask %08x", describe(site).c_str(),
                  mask, i, describe(other.site).c_str(), other.mask));
    }
  }
  if (op == WarpOp::sync) release(me.sync);
  if (complete_now) {
    complete(me);
    if (settings.order == Order::random) wait(State::ready);
  } else {
    wait(State::in_warp);
  }
  if (op == WarpOp::sync) acquire(me.last->sync);  // shuffles and votes order no memory
  return me.got;
}

// Serves every lane of the mask and lets it go on.
void Block::complete(Thread& last) {
  Thread* const warp = &all_[last.warp * kWarp];
  unsigned ballot = 0;
  for (int i = 0; i < kWarp; ++i)
    if ((last.mask >> i & 1) && unpack<unsigned>(warp[i].brought)) ballot |= 1u << i;
  for (int i = 0; i < kWarp; ++i) {
    if (!(last.mask >> i & 1)) continue;
    Thread& thread = warp[i];
    if (last.op == WarpOp::sync) {
      if (&thread != &last) acquire(thread.sync);
    } else if (last.op == WarpOp::ballot) {
      thread.got = pack(ballot);
    } else {
      const int from = source(thread);
      if (!(last.mask >> from & 1))
        stop(format("shuffle at %s: lane %d reads lane %d, which is not in mask %08x", describe(last.site).c_str(), i,
                    from, last.mask));
      thread.got = warp[from].brought;
    }
    thread.last = &last;
    thread.state = State::ready;
  }
  if (last.op == WarpOp::sync) release(last.sync);
}

// The lane that a shuffle reads, by CUDA's rules: within a segment of `width` lanes, else its own.
int Block::source(const Thread& reader) const {
  const int segment = reader.lane & ~(reader.width - 1), place = reader.lane & (reader.width - 1);
  switch (reader.op) {
    case WarpOp::index:
      return segment | (reader.asked & (reader.width - 1));
    case WarpOp::up:
      return place - reader.asked < 0 ? reader.lane : reader.lane - reader.asked;
    case WarpOp::down:
      return place + reader.asked >= reader.width ? reader.lane : reader.lane + reader.asked;
    default: {
      const int other = reader.lane ^ reader.asked;
      return other >= segment + reader.width || other < 0 ? reader.lane : other;
    }
  }
}

int barrier(bool vote, Site site) { return Block::running()->barrier(vote, site); }

Bits exchange(WarpOp op, unsigned mask, Bits value, int lane, int width, Site site) {
  return Block::running()->exchange(op, mask, value, lane, width, site);
}

void* shared_piece(int index, long long count, size_t size) { return Block::running()->piece(index, count, size); }

void maybe_yield() { Block::running()->yield(); }

void fail(const char* text, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, text);
  std::vsnprintf(buffer, sizeof(buffer), text, arguments);
  va_end(arguments);
  if (Block::running() != nullptr) Block::running()->stop(buffer);
  std::fprintf(stderr, "simt: outside of a kernel: %s\n", buffer);
  std::abort();
}

}  // namespace simt
