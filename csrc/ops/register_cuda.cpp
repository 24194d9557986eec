// The ops on CUDA.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "cuda_device.h"
#include "low_rank_linear.h"

// Weak: a torch built for CPUs lacks it, and the extension must load there too.
extern "C" AOTITorchError __attribute__((weak)) aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                    void** ret_stream);

namespace shrank {
namespace {

void epilogue(const EpilogueParams& params, const EpilogueTile& tile, int index) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  if (torch::stable::accelerator::getCurrentDeviceIndex() == index) return launch_epilogue(params, tile, stream);
  const torch::stable::accelerator::DeviceGuard guard(index);
  launch_epilogue(params, tile, stream);
}

constexpr Backend cuda{cuda_device, epilogue};

}  // namespace
}  // namespace shrank

STABLE_TORCH_LIBRARY_IMPL(shrank, CUDA, library) { SHRANK_IMPL_LOW_RANK_LINEAR(library, shrank::cuda); }
