#include "current_stream.h"

#include <dlfcn.h>

#include <stdexcept>

// Weak: a torch built for CPUs lacks it, and the extension must load there too.
extern "C" int32_t __attribute__((weak)) aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace shrank {

CurrentStream find_current_stream() {
  if (aoti_torch_get_current_cuda_stream != nullptr) return aoti_torch_get_current_cuda_stream;
  // Python loads torch for itself alone (RTLD_LOCAL): another linker may not see what this process has.
  void* const library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
  void* const found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  if (found == nullptr) {
    throw std::runtime_error(
        "shrank: aoti_torch_get_current_cuda_stream was not found: it is in libtorch_cuda.so, which is not loaded. "
        "Tensors on a CUDA device need a torch built with CUDA, loaded before this library");
  }
  return reinterpret_cast<CurrentStream>(found);
}

}  // namespace shrank
