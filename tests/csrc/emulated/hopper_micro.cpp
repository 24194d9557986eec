#include "hopper_micro.h"

#include <stdexcept>

#include "hopper_micro.cuh"

namespace shrank::tests {
namespace {

using Run = emulator::Result (*)(const std::string&, const HopperMicroParams&, const emulator::Options&);

template <typename Kernel>
emulator::Result launch(const std::string& name, const HopperMicroParams& params, const emulator::Options& options) {
  return emulator::launch<Kernel>(
      name, {}, params,
      {{"input", params.input, 64 * 128, false, false}, {"output", params.output, 128 * 4, true, false}}, options);
}

struct Named {
  const char* name;
  Run run;
};

#define SHRANK_PRODUCT(slip) {"product/" #slip, launch<StoredProduct<Slip::slip>>}
#define SHRANK_TILE(slip) {"tile/" #slip, launch<OneTile<TileSlip::slip>>}
constexpr Named kKernels[] = {
    SHRANK_PRODUCT(none),
    SHRANK_PRODUCT(no_proxy_fence),
    SHRANK_PRODUCT(proxy_fence_too_soon),
    SHRANK_PRODUCT(no_warpgroup_fence),
    SHRANK_PRODUCT(read_before_wait),
    SHRANK_PRODUCT(never_awaited),
    SHRANK_PRODUCT(never_committed),
    SHRANK_PRODUCT(stored_while_read),
    SHRANK_PRODUCT(one_warp_differs),
    SHRANK_PRODUCT(one_warp_less),
    SHRANK_PRODUCT(unswizzled_operand),
    SHRANK_TILE(none),
    SHRANK_TILE(never_awaited),
    SHRANK_TILE(not_aligned),
    SHRANK_TILE(past_the_matrix),
    SHRANK_TILE(read_before_wait),
    SHRANK_TILE(arrives_twice),
    SHRANK_TILE(not_made),
};
#undef SHRANK_PRODUCT
#undef SHRANK_TILE

}  // namespace

std::vector<std::string> hopper_micro_names() {
  std::vector<std::string> names;
  for (const Named& kernel : kKernels) names.push_back(kernel.name);
  return names;
}

emulator::Result run_hopper_micro(const std::string& name, const uint32_t* input, float* output,
                                  const emulator::Options& options) {
  // One kernel's map tells of more rows than there are.
  const int64_t rows = name == "tile/past_the_matrix" ? 128 : 64;
  const HopperMicroParams params{{input, 64, rows, 128, 64, 64}, input, output};
  for (const Named& kernel : kKernels)
    if (name == kernel.name) return kernel.run(name, params, options);
  throw std::invalid_argument("no kernel is called " + name);
}

}  // namespace shrank::tests
