// The ops on CUDA.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "cuda_device.h"
#include "current_stream.h"
#include "expand_backward.h"
#include "gated_backward.h"
#include "low_rank_conv.h"
#include "low_rank_gated.h"
#include "low_rank_linear.h"
#include "low_rank_linear_multi.h"
#include "low_rank_pivoted.h"
#include "pivoted_backward.h"

namespace shrank {
namespace {

// Calls launch(stream) with the device current and its current stream.
template <typename Launch> void on_device(int index, const Launch& launch) {
  static const CurrentStream current_stream = find_current_stream();
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(current_stream(index, &stream));
  if (torch::stable::accelerator::getCurrentDeviceIndex() == index) return launch(stream);
  const torch::stable::accelerator::DeviceGuard guard(index);
  launch(stream);
}

bool capturing(int index) {
  bool captured = false;
  on_device(index, [&](void* stream) { captured = is_capturing(stream); });
  return captured;
}

void epilogue(const EpilogueParams& params, const EpilogueTile& tile, int index) {
  on_device(index, [&](void* stream) { launch_epilogue(params, tile, stream); });
}

void epilogue_backward(const EpilogueBackwardParams& params, const EpilogueTile& tile, int index) {
  on_device(index, [&](void* stream) { launch_epilogue_backward(params, tile, stream); });
}

// Programmatic dependent launch begins with compute capability 9.0.
void linear(const LowRankLinearParams& params, const LinearGrid& grid, const Device& device, int index) {
  on_device(index, [&](void* stream) { launch_low_rank_linear(params, grid, device.arch >= 90, stream); });
}

void conv(const LowRankConvParams& params, const ConvGrid& grid, const Device& device, int index) {
  on_device(index, [&](void* stream) { launch_low_rank_conv(params, grid, device.arch >= 90, stream); });
}

void expand_backward(const ExpandBackwardParams& params, const LinearGrid& grid, const Device& device, int index) {
  on_device(index, [&](void* stream) { launch_expand_backward(params, grid, device.arch >= 90, stream); });
}

void shrink_expand(const ShrinkExpandParams& params, const ShrinkExpandTile& tile, const Device& device, int index) {
  on_device(index, [&](void* stream) { launch_shrink_expand(params, tile, device.arch >= 90, stream); });
}

constexpr Runtime cuda{cuda_device, capturing,     epilogue, epilogue_backward,
                       linear,      shrink_expand, conv,     expand_backward};

}  // namespace
}  // namespace shrank

STABLE_TORCH_LIBRARY_IMPL(shrank, CUDA, library) {
  SHRANK_IMPL_LOW_RANK_LINEAR(library, shrank::cuda);
  SHRANK_IMPL_LOW_RANK_LINEAR_MULTI(library, shrank::cuda);
  SHRANK_IMPL_LOW_RANK_CONV(library, shrank::cuda);
  SHRANK_IMPL_LOW_RANK_GATED(library, shrank::cuda);
  SHRANK_IMPL_LOW_RANK_PIVOTED(library, shrank::cuda);
  SHRANK_IMPL_EXPAND_BACKWARD(library, shrank::cuda);
  SHRANK_IMPL_GATED_BACKWARD(library, shrank::cuda);
  SHRANK_IMPL_PIVOTED_BACKWARD(library, shrank::cuda);
}
