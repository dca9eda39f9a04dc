// Stands in for the CUDA runtime: the library's own launchers run on the CPU, and each launch is noted instead of made.
// cuda_launches.py links it with what nvcc made of every cuda.cu.
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>

#include <driver_types.h>
#include <vector_types.h>

namespace {

// A function, because kernels are registered before this file's variables are there.
std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}

std::string launches, told, wrong;
int multiprocessors = 1, largest_shared = 48 * 1024, capability = 80;
std::map<const void*, int> allowed;

bool bad(const char* what) {
  wrong = what;
  return true;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// A device that launchers may ask about: bytes of shared memory that a block may ask for, 86 for capability 8.6.
API void recorder_device(int count, int shared, int arch) {
  multiprocessors = count, largest_shared = shared, capability = arch;
  allowed.clear();
}

// The launches since the last call, one a line: kernel, grid, block, bytes of dynamic shared memory.
API const char* recorder_take() {
  told.swap(launches);
  launches.clear();
  return told.c_str();
}

API void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                                int*) {
  kernels()[host] = name;
}
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API cudaError_t __cudaGetKernel(void**, const void*) { return cudaSuccess; }
API cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, void*) { return cudaErrorNotSupported; }
API unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 1; }
API cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }

API cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = largest_shared;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability / 10;
      return cudaSuccess;
    default:
      return bad("this attribute is not recorded") ? cudaErrorNotSupported : cudaSuccess;
  }
}

API cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > largest_shared && bad("more shared memory than the device has")) return cudaErrorInvalidValue;
  allowed[kernel] = value;
  return cudaSuccess;
}

API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const size_t shared = config->dynamicSmemBytes, plain = 48 * 1024;
  const unsigned threads = block.x * block.y * block.z;
  const size_t most = allowed.count(kernel) && allowed[kernel] > int(plain) ? allowed[kernel] : plain;
  if (threads == 0 || threads > 1024 || threads % 32 != 0) bad("a block of no, too many or odd threads");
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535)
    bad("a grid out of bounds");
  if (shared > most) bad("more shared memory than was asked for");
  if (!wrong.empty()) return cudaErrorInvalidConfiguration;
  char line[128];
  std::snprintf(line, sizeof line, " %u %u %u %u %zu\n", grid.x, grid.y, grid.z, threads, shared);
  launches += kernels()[kernel] + line;
  return cudaSuccess;
}

API cudaError_t cudaGetLastError() { return cudaSuccess; }
API const char* cudaGetErrorString(cudaError_t) { return wrong.c_str(); }
