// What this build is, and what it would choose: ops without tensors that answer in JSON.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <charconv>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "../kernels/image.h"
#include "../select/explain.h"
#include "cuda_device.h"

namespace shrank {
namespace {

std::string version(int number) {  // 13000 -> 13.0
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// The CUDA runtime inside, the architectures, the torch it was compiled against. Asks no driver: the runtime's own
// question for its version would initialise it, and a process that only looks must stay free to fork.
std::string build_info() {
  const uint64_t torch = TORCH_ABI_VERSION;
  return R"({"cuda": ")" + version(CUDART_VERSION) + R"(", "archs": ")" SHRANK_CUDA_ARCHS R"(", "torch": ")" +
         std::to_string(torch >> 56) + "." + std::to_string(torch >> 48 & 255) + "\"}";
}

std::string why_no_image_on(int64_t index) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(index));
  return why_no_image();
}

// "cuda:1" is a GPU that is here; any other name, such as "H200", one that need not be.
const Device& device_of(std::string_view gpu) {
  constexpr std::string_view here = "cuda:";
  int index = 0;
  const char* const end = gpu.data() + gpu.size();
  if (gpu.substr(0, here.size()) == here && std::from_chars(gpu.data() + here.size(), end, index).ptr == end)
    return cuda_device(index);
  return device_named(gpu);
}

std::string explain_for(int64_t M, int64_t K, int64_t N, int64_t R, std::string_view dtype, std::string_view activation,
                        bool bias, bool residual, bool training, int64_t gate_R, bool pivoted, std::string_view gpu) {
  LinearProblem problem{M, K, N, R, parse_dtype(dtype), parse_activation(activation), bias, residual, training};
  problem.gate_R = gate_R;
  problem.pivoted = pivoted;
  return explain(problem, device_of(gpu));
}

using Sizes = std::vector<int64_t>;

Size3 three(const char* name, const Sizes& sizes) {
  if (sizes.size() != 3) throw std::invalid_argument(std::string(name) + ": wanted depth, height and width");
  return {sizes[0], sizes[1], sizes[2]};
}

std::string explain_conv(int64_t batch, int64_t C, int64_t N, int64_t R, const Sizes& input, const Sizes& kernel,
                         const Sizes& stride, const Sizes& begin, const Sizes& end, const Sizes& dilation,
                         int64_t groups, int64_t up_groups, std::string_view dtype, std::string_view activation,
                         bool bias, bool residual, bool training, bool channels_last, std::string_view gpu) {
  const ConvProblem problem{batch,
                            C,
                            N,
                            R,
                            three("input", input),
                            three("kernel", kernel),
                            three("stride", stride),
                            three("begin", begin),
                            three("end", end),
                            three("dilation", dilation),
                            groups,
                            up_groups,
                            parse_dtype(dtype),
                            parse_activation(activation),
                            bias,
                            residual,
                            training,
                            channels_last};
  return explain(problem, device_of(gpu));
}

}  // namespace
}  // namespace shrank

STABLE_TORCH_LIBRARY_FRAGMENT(shrank, library) {
  library.def("build_info() -> str");
  library.def("why_no_image(int device) -> str");
  library.def(
      "explain(int M, int K, int N, int R, str dtype, str activation, bool bias, bool residual, bool training, "
      "int gate_R, bool pivoted, str gpu) -> str");
  library.def(
      "explain_conv(int batch, int C, int N, int R, int[] input, int[] kernel, int[] stride, int[] begin, "
      "int[] end, int[] dilation, int groups, int up_groups, str dtype, str activation, bool bias, "
      "bool residual, bool training, bool channels_last, str gpu) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(shrank, CompositeExplicitAutograd, library) {
  library.impl("build_info", TORCH_BOX(&shrank::build_info));
  library.impl("why_no_image", TORCH_BOX(&shrank::why_no_image_on));
  library.impl("explain", TORCH_BOX(&shrank::explain_for));
  library.impl("explain_conv", TORCH_BOX(&shrank::explain_conv));
}
