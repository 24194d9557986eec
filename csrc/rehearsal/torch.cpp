// Stand-ins for what libtorch says of CUDA devices: the extension's own objects are linked against these instead. Tensors
// are a CPU's; the ops that the extension registers for CUDA run on them.
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "machine.h"

using shrank::rehearsal::machine;

namespace {

template <typename Function> Function* real(const char* name) {
  void* const found = dlsym(RTLD_NEXT, name);
  if (!found) throw std::runtime_error(std::string("rehearsal: libtorch has no ") + name);
  return reinterpret_cast<Function*>(found);
}

// A guard is the device to go back to.
struct Guard { int before; };

}  // namespace

extern "C" {

int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  if (device < 0 || static_cast<std::size_t>(device) >= machine().gpus.size()) return 1;
  *stream = const_cast<void*>(machine().gpus[static_cast<std::size_t>(device)].stream);
  return 0;
}

int32_t aoti_torch_get_current_device_index(int32_t* device) {
  *device = machine().current;
  return 0;
}

int32_t aoti_torch_get_device_index(void*, int32_t* device) {
  *device = machine().tensors_on;
  return 0;
}

int32_t aoti_torch_device_type_cuda();

int32_t aoti_torch_get_device_type(void*, int32_t* type) {
  *type = aoti_torch_device_type_cuda();
  return 0;
}

int32_t aoti_torch_device_type_cpu();

// As all tensors, on the CPU.
int32_t aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t,
                                 int32_t, void** made) {
  static auto* const make = real<int32_t(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, void**)>(
      "aoti_torch_empty_strided");
  return make(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, made);
}

int32_t aoti_torch_create_device_guard(int32_t device, Guard** guard) {
  *guard = new Guard{machine().current};
  machine().current = device;
  return 0;
}

int32_t aoti_torch_delete_device_guard(Guard* guard) {
  machine().current = guard->before;
  delete guard;
  return 0;
}

int32_t aoti_torch_library_init_impl(const char* library, const char* key, const char* file, uint32_t line,
                                     void** made) {
  static auto* const init = real<int32_t(const char*, const char*, const char*, uint32_t, void**)>(
      "aoti_torch_library_init_impl");
  return init(library, std::strcmp(key, "CUDA") == 0 ? "CPU" : key, file, line, made);
}

}  // extern "C"
