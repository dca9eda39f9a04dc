// A block of threads while it runs.
#pragma once

#include <string>
#include <vector>

#include "simt.h"
#include "workplace.h"

namespace simt {

constexpr int kWarp = 32;

enum class Order : int { ascending, descending, random };

struct Settings {
  Order order = Order::ascending;
  uint64_t seed = 1;
  int shared_per_block = 227 * 1024;  // what a kernel may ask for; 48 KB are free
  int capability = 90;
};
extern Settings settings;

enum class State { ready, at_barrier, in_warp, done };

struct Thread {
  Fiber* fiber = nullptr;
  char* sync = nullptr;  // Workplace::threads
  uint3 index = {};
  State state = State::ready;
  int number = 0, lane = 0, warp = 0;
  Site site = {};  // of the last call that waits

  // exchange()
  WarpOp op = WarpOp::sync;
  unsigned mask = 0;
  Bits brought = {}, got = {};
  int asked = 0, width = 0;
  Thread* last = nullptr;  // who completed the exchange

  int votes = 0;  // barrier()
};

struct Piece {
  char* memory;
  size_t bytes;
};

class Block {
 public:
  Block(dim3 blocks, dim3 threads, size_t shared_bytes, void (*body)(void*), void* arguments);

  // Runs all threads of one block; false: failed, and text() says why.
  bool run(uint3 index);

  const std::string& text() const { return text_; }

  int barrier(bool vote, Site site);
  Bits exchange(WarpOp op, unsigned mask, Bits value, int lane, int width, Site site);
  void* piece(int index, long long count, size_t size);
  void yield();
  uint64_t draw();
  [[noreturn]] void stop(const std::string& what);

  static Block* running();

 private:
  static void enter();
  void prepare(uint3 index);
  void schedule();
  void resume(Thread& thread);
  void wait(State state);
  void open_barrier();
  void complete(Thread& last);
  int source(const Thread& reader) const;
  void find_deadlock();
  void check_red_zones();

  dim3 blocks_, threads_;
  size_t shared_bytes_;
  void (*body_)(void*);
  void* arguments_;
  int count_;
  std::vector<Thread> all_;
  std::vector<int> order_;
  Fiber scheduler_;
  Thread* current_ = nullptr;

  int alive_ = 0, arrived_ = 0, votes_ = 0;
  int generation_ = 0;
  const Thread* first_arrived_ = nullptr;

  Workplace* place_ = nullptr;
  size_t shared_used_ = 0, shared_counted_ = 0;
  std::vector<Piece> pieces_;

  bool failed_ = false;
  std::string text_;
  uint64_t random_;
};

// "kernel.cu:12 in name", with the path cut down to what follows csrc/.
std::string describe(Site site);
std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));

// The name of a function, for errors; its address where there is none.
std::string kernel_name(const void* kernel);

}  // namespace simt
