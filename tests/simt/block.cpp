#include "block.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>

__thread uint3 threadIdx = {}, blockIdx = {};
__thread dim3 blockDim, gridDim;

namespace simt {

Settings settings;

namespace {

thread_local Block* running_block = nullptr;
uint64_t launches = 0;

}  // namespace

Block* Block::running() { return running_block; }

Block::Block(dim3 blocks, dim3 threads, size_t shared_bytes, void (*body)(void*), void* arguments)
    : blocks_(blocks),
      threads_(threads),
      shared_bytes_(shared_bytes),
      body_(body),
      arguments_(arguments),
      count_(static_cast<int>(threads.x * threads.y * threads.z)),
      all_(count_),
      order_(count_),
      random_((settings.seed + ++launches) * 0x9e3779b97f4a7c15ull) {  // another order each time
  for (int i = 0; i < count_; ++i) order_[i] = settings.order == Order::descending ? count_ - 1 - i : i;
}

void Block::prepare(uint3 index) {
  const size_t room = (shared_bytes_ + 15) / 16 * 16 + kMostPieces * kRedZone + kRedZone;
  place_ = &find_workplace(count_, room, draw());
  simt::prepare(*place_, count_, room, &Block::enter);
  blockIdx = index, blockDim = threads_, gridDim = blocks_;
  pieces_.clear();
  shared_used_ = kRedZone, shared_counted_ = 0;
  alive_ = count_, arrived_ = votes_ = 0;
  for (int i = 0; i < count_; ++i) {
    Thread& thread = all_[i];
    const unsigned n = static_cast<unsigned>(i);
    thread.index = {n % threads_.x, n / threads_.x % threads_.y, n / (threads_.x * threads_.y)};
    thread.fiber = &place_->fibers[i], thread.sync = &place_->threads[i];
    thread.number = i, thread.lane = i % kWarp, thread.warp = i / kWarp, thread.state = State::ready;
  }
}

void Block::enter() {
  Block& block = *running_block;
  entered(block.scheduler_);
  acquire(&block.place_->blocks[block.place_->turn]);
  block.body_(block.arguments_);
  Thread& me = *block.current_;
  release(&block.place_->blocks[1 - block.place_->turn]);
  if (block.arrived_ > 0)
    block.stop(format("it ends while thread %d waits at the barrier %s", block.first_arrived_->number,
                      describe(block.first_arrived_->site).c_str()));
  me.state = State::done;
  --block.alive_;
  change(*me.fiber, block.scheduler_, true);
  __builtin_trap();
}

bool Block::run(uint3 index) {
  Block* const outer = running_block;
  running_block = this;
  scheduler_ = adopt();
  prepare(index);
  schedule();
  if (!failed_) check_red_zones();
  if (failed_) abandon(*place_);
  running_block = outer;
  return !failed_;
}

void Block::schedule() {
  while (alive_ > 0 && !failed_) {
    if (settings.order == Order::random)
      for (int i = count_ - 1; i > 0; --i) std::swap(order_[i], order_[draw() % (i + 1)]);
    bool progress = false;
    for (int i = 0; i < count_ && !failed_; ++i) {
      Thread& thread = all_[order_[i]];
      if (thread.state == State::ready) progress = true, resume(thread);
    }
    if (!progress && !failed_) find_deadlock();
  }
}

void Block::resume(Thread& thread) {
  current_ = &thread;
  threadIdx = thread.index;
  change(scheduler_, *thread.fiber, false);
}

void Block::wait(State state) {
  Thread& me = *current_;
  me.state = state;
  change(*me.fiber, scheduler_, false);
}

void Block::yield() {
  if (settings.order == Order::random && draw() % 4 == 0) wait(State::ready);
}

uint64_t Block::draw() {
  random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
  return random_;
}

void Block::stop(const std::string& what) {
  const uint3 t = current_->index;
  failed_ = true;
  text_ = format("thread (%u,%u,%u): ", t.x, t.y, t.z) + what;
  change(*current_->fiber, scheduler_, true);
  __builtin_trap();
}

void Block::find_deadlock() {
  failed_ = true;
  text_ = "deadlock:";
  const Thread* before = nullptr;
  for (const Thread& thread : all_) {
    if (thread.state == State::done) continue;
    const bool same = before != nullptr && before->state == thread.state && before->site.line == thread.site.line;
    if (!same && thread.state == State::at_barrier)
      text_ += format(" thread %d waits at the barrier %s;", thread.number, describe(thread.site).c_str());
    else if (!same)
      text_ += format(" thread %d waits for the lanes of %08x at %s;", thread.number, thread.mask,
                      describe(thread.site).c_str());
    before = &thread;
  }
}

void* Block::piece(int index, long long count, size_t size) {
  const size_t number = static_cast<size_t>(index), bytes = static_cast<size_t>(count) * size;
  if (count < 0) stop(format("SharedMemory::take(%lld)", count));
  if (number < pieces_.size()) {
    if (pieces_[number].bytes != bytes)
      stop(format("SharedMemory::take() number %d: %zu bytes, but %zu in another thread", index + 1, bytes,
                  pieces_[number].bytes));
    return pieces_[number].memory;
  }
  if (number >= kMostPieces) stop(format("SharedMemory: more than %d pieces", kMostPieces));
  const size_t rounded = (bytes + 15) / 16 * 16;
  shared_counted_ += rounded;
  if (shared_counted_ > shared_bytes_)
    stop(format("SharedMemory: the kernel takes %zu bytes, but was launched with %zu", shared_counted_, shared_bytes_));
  pieces_.push_back({place_->shared + shared_used_, bytes});
  shared_used_ += rounded + kRedZone;
  SIMT_UNPOISON(pieces_.back().memory, bytes);
  return pieces_.back().memory;
}

void Block::check_red_zones() {
  SIMT_UNPOISON(place_->shared, place_->shared_bytes);
  const char* at = place_->shared;
  for (size_t i = 0; i <= pieces_.size() && !failed_; ++i) {
    const char* const end = i < pieces_.size() ? pieces_[i].memory : place_->shared + shared_used_;
    const char* const hit = std::find_if(at, end, [](char c) { return static_cast<unsigned char>(c) != kNaN; });
    if (hit < end) {
      failed_ = true;
      text_ =
          format("writes shared memory outside its pieces: %td bytes past the end of take() number %zu", hit - at, i);
    }
    if (i < pieces_.size()) at = pieces_[i].memory + pieces_[i].bytes;
  }
}

std::string describe(Site site) {
  const std::string path = site.file == nullptr ? "?" : site.file;
  const size_t csrc = path.rfind("csrc/");
  return (csrc == std::string::npos ? path : path.substr(csrc)) + ":" + std::to_string(site.line);
}

std::string format(const char* text, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, text);
  std::vsnprintf(buffer, sizeof(buffer), text, arguments);
  va_end(arguments);
  return buffer;
}

}  // namespace simt
