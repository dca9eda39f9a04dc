// Launches, and the few functions of the CUDA runtime that launchers call.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <map>
#include <mutex>
#include <numeric>

#include "block.h"

namespace simt {

namespace {

constexpr int kFreeShared = 48 * 1024;
enum : int { kSuccess = 0, kInvalidValue = 1, kInvalidConfiguration = 9, kLaunchFailure = 719 };

thread_local std::string last_text;
std::mutex allowed_lock;
std::map<const void*, int> allowed;  // by kernel: dynamic shared memory, where more than 48 KB

std::string wrong_size(dim3 blocks, dim3 threads, size_t shared_bytes, const void* kernel) {
  const auto one = [](dim3 d, unsigned x, unsigned y, unsigned z) {
    return d.x >= 1 && d.x <= x && d.y >= 1 && d.y <= y && d.z >= 1 && d.z <= z;
  };
  const auto text = [](dim3 d) { return format("(%u,%u,%u)", d.x, d.y, d.z); };
  if (!one(threads, 1024, 1024, 64) || uint64_t{threads.x} * threads.y * threads.z > kMostThreads)
    return "a block of " + text(threads) + " threads; at most 1024, 64 of them along z";
  if (!one(blocks, 0x7fffffffu, 65535, 65535))
    return "a grid of " + text(blocks) + " blocks; at most (2147483647,65535,65535)";
  const std::lock_guard<std::mutex> guard(allowed_lock);
  const auto found = allowed.find(kernel);
  const size_t most = static_cast<size_t>(found == allowed.end() ? kFreeShared : found->second);
  if (shared_bytes > most) return format("%zu bytes of shared memory; at most %zu", shared_bytes, most);
  return "";
}

int refuse(int error, const void* kernel, const std::string& why) {
  last_text = "simt: " + kernel_name(kernel) + ": " + why;
  return error;
}

}  // namespace

int run(dim3 blocks, dim3 threads, size_t shared_bytes, const void* kernel, void (*body)(void*), void* arguments) {
  const std::string wrong = wrong_size(blocks, threads, shared_bytes, kernel);
  if (!wrong.empty()) return refuse(kInvalidConfiguration, kernel, "launched with " + wrong);
  std::vector<uint64_t> order(uint64_t{blocks.x} * blocks.y * blocks.z);
  std::iota(order.begin(), order.end(), 0);
  Block block(blocks, threads, shared_bytes, body, arguments);
  if (settings.order == Order::descending) std::reverse(order.begin(), order.end());
  if (settings.order == Order::random)
    for (size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[block.draw() % (i + 1)]);
  std::string failure;
  for (const uint64_t number : order) {
    const uint3 index = {static_cast<unsigned>(number % blocks.x), static_cast<unsigned>(number / blocks.x % blocks.y),
                         static_cast<unsigned>(number / blocks.x / blocks.y)};
    if (!block.run(index)) {
      failure = format("block (%u,%u,%u) ", index.x, index.y, index.z) + block.text();
      break;
    }
  }
  acquire_all();
  return failure.empty() ? kSuccess : refuse(kLaunchFailure, kernel, failure);
}

int allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > settings.shared_per_block)
    return refuse(kInvalidValue, kernel,
                  format("asks for %d bytes of shared memory; the device has %d", bytes, settings.shared_per_block));
  const std::lock_guard<std::mutex> guard(allowed_lock);
  allowed[kernel] = std::max(bytes, kFreeShared);
  return kSuccess;
}

int device_attribute(int attribute, int* value) {
  const std::map<int, int> values = {
      // by cudaDeviceAttr
      {1, kMostThreads},
      {8, kFreeShared},
      {10, kWarp},
      {16, 4},
      {39, 2048},
      {75, settings.capability / 10},
      {76, settings.capability % 10},
      {81, settings.shared_per_block + 1024},
      {97, settings.shared_per_block},
  };
  const auto found = values.find(attribute);
  if (found == values.end()) {
    last_text = format("simt: device attribute %d is not emulated", attribute);
    return kInvalidValue;
  }
  *value = found->second;
  return kSuccess;
}

const char* error_text(int error) { return error == kSuccess ? "no error" : last_text.c_str(); }

// Looks the function up in the symbol table of the library that it is in: kernels are local to their file, which
// dladdr() does not see.
std::string kernel_name(const void* kernel) {
  Dl_info info = {};
  if (dladdr(kernel, &info) == 0) return format("kernel at %p", kernel);
  std::ifstream file(info.dli_fname, std::ios::binary);
  const std::string data((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const auto base = reinterpret_cast<uintptr_t>(info.dli_fbase), wanted = reinterpret_cast<uintptr_t>(kernel) - base;
  if (data.size() < sizeof(Elf64_Ehdr)) return format("kernel at %p", kernel);
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(data.data());
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(data.data() + header->e_shoff);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = reinterpret_cast<const Elf64_Sym*>(data.data() + sections[i].sh_offset);
    const char* names = data.data() + sections[sections[i].sh_link].sh_offset;
    for (size_t n = 0; n < sections[i].sh_size / sizeof(Elf64_Sym); ++n) {
      if (symbols[n].st_value != wanted || ELF64_ST_TYPE(symbols[n].st_info) != STT_FUNC) continue;
      int status = 0;
      char* const readable = abi::__cxa_demangle(names + symbols[n].st_name, nullptr, nullptr, &status);
      std::string name = status == 0 ? readable : names + symbols[n].st_name;
      std::free(readable);
      for (const std::string noise : {"uz::cuda::", "(anonymous namespace)::", "void "})
        for (size_t at; (at = name.find(noise)) != std::string::npos;) name.erase(at, noise.size());
      const size_t parameters = name.find('(');
      if (parameters != std::string::npos) name.resize(parameters);
      return name;
    }
  }
  return format("kernel at %p", kernel);
}

}  // namespace simt

// For the tests: the order of the threads (0 ascending, 1 descending, 2 random by the seed), and the device to be.
extern "C" __attribute__((visibility("default"))) void simt_configure(int order, unsigned long long seed,
                                                                      int shared_per_block, int capability) {
  simt::settings = {static_cast<simt::Order>(order), seed, shared_per_block, capability};
}

// What ultrazoo.ops.loader asks of a library of kernels.
extern "C" __attribute__((visibility("default"))) const char* ultrazoo_cpu_isa() { return "simt"; }
