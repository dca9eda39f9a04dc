// What the threads of a block stand on: fibers with their stacks, and shared memory. Later blocks use it again.
#pragma once

#include <cstdint>
#include <vector>

#include "fiber.h"

namespace simt {

constexpr int kMostThreads = 1024;
constexpr int kMostPieces = 64;
constexpr size_t kRedZone = 64;
constexpr unsigned char kNaN = 0xff;  // four of them are a NaN in fp32, two in fp16 and bf16

struct Workplace {
  std::vector<Fiber> fibers;
  char* stacks = nullptr;
  char* shared = nullptr;
  size_t shared_bytes = 0;

  // ThreadSanitizer's addresses. A block acquires one of `blocks` when its threads start and releases the other when
  // they end, which the next block here acquires; barriers take turns as well; each thread has one of its own.
  char blocks[2] = {}, barriers[2] = {};
  int turn = 0;
  std::vector<char> threads;
};

// The workplace for one more block. Plain builds have a single one. Under ThreadSanitizer there are several, picked at
// random: blocks that share one seem to run one after the other, so only races between the others are seen. (A fresh
// one for each block would see them all, but a fiber of ThreadSanitizer takes half a millisecond to make.)
Workplace& find_workplace(int threads, size_t shared_bytes, uint64_t random);

// Fills shared memory with NaN and poisons it, and puts `entry` at the start of each fiber.
void prepare(Workplace& place, int threads, size_t shared_bytes, void (*entry)());

// After a failure, fibers are left in the middle of something: throws them away.
void abandon(Workplace& place);

// The code that launches goes on after all blocks that have ended.
void acquire_all();

}  // namespace simt
