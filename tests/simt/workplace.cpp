#include "workplace.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>

namespace simt {

namespace {

#if defined(SIMT_TSAN)
constexpr int kFibers = 1024;  // in all workplaces together, about; each takes a quarter of a MiB
constexpr size_t kStack = 64 << 10;
#else
constexpr int kFibers = 0;
constexpr size_t kStack = 256 << 10;
#endif
constexpr size_t kPage = 4096;

thread_local std::vector<std::unique_ptr<Workplace>> workplaces;  // of one thread of the CPU, for all of its launches

char* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("simt: mmap");
    std::abort();
  }
  return static_cast<char*>(memory);
}

}  // namespace

Workplace& find_workplace(int threads, size_t shared_bytes, uint64_t random) {
  const size_t many = static_cast<size_t>(std::clamp(kFibers / threads, kFibers > 0 ? 2 : 1, 16)),
               number = random % many;
  while (workplaces.size() <= number) workplaces.push_back(std::make_unique<Workplace>());
  Workplace& place = *workplaces[number];
  if (place.stacks == nullptr) {
    place.stacks = reserve(kStack * kMostThreads);
    for (int i = 0; i < kMostThreads; ++i) mprotect(place.stacks + i * kStack, kPage, PROT_NONE);  // overflows crash
    place.threads.resize(kMostThreads);
    place.fibers.reserve(kMostThreads);
  }
  while (place.fibers.size() < static_cast<size_t>(threads)) {
    char* const stack = place.stacks + kStack * place.fibers.size() + kPage;
    place.fibers.push_back(make_fiber(stack, kStack - kPage));
  }
  if (place.shared_bytes < shared_bytes) {
    if (place.shared != nullptr) munmap(place.shared, place.shared_bytes);
    place.shared = reserve(shared_bytes);
    place.shared_bytes = shared_bytes;
  }
  return place;
}

void prepare(Workplace& place, int threads, size_t shared_bytes, void (*entry)()) {
  SIMT_UNPOISON(place.shared, place.shared_bytes);
  uint64_t nan;
  __builtin_memset(&nan, kNaN, sizeof(nan));
  // no memset: ThreadSanitizer would see it, and take it for a race with the block before
  auto* const words = reinterpret_cast<volatile uint64_t*>(place.shared);
  for (size_t i = 0; i < shared_bytes / sizeof(nan); ++i) words[i] = nan;
  SIMT_POISON(place.shared, place.shared_bytes);
  for (int i = 0; i < threads; ++i) {
    const size_t offset = static_cast<size_t>(i) % 16 * 192;  // or all stacks would share a few lines of the cache
    start(place.fibers[i], offset, entry);
  }
  place.turn = 1 - place.turn;
  release(&place.blocks[place.turn]);
}

void abandon(Workplace& place) {
  for (Fiber& fiber : place.fibers) destroy(fiber);
  place.fibers.clear();
}

void acquire_all() {
  for (const auto& place : workplaces)
    for (char& block : place->blocks) acquire(&block);
}

}  // namespace simt
