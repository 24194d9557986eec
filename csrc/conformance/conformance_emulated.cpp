#include "conformance_emulated.h"

#include <stdexcept>
#include <type_traits>

#include "conformance.cuh"

namespace shrank::conformance {

std::vector<Result> run_emulated(const emulator::Options& options) {
  std::vector<Result> results;
  for_each_case([&](const char* name, auto kernel) {
    using Kernel = decltype(kernel);
    Result result{name, inputs_of(Kernel::kInputs, Kernel::kInputWords),
                  std::vector<uint32_t>(Kernel::kOutputWords, kUntouched)};
    typename Kernel::Params params{};
    params.input = result.input.data();
    params.output = result.output.data();
    if constexpr (std::is_same_v<typename Kernel::Params, TileParams>)
      params.map = {params.input, kMatrixColumns, kMatrixRows, kMatrixColumns * 2, kTileColumns, kTileRows};
    const std::vector<emulator::Buffer> buffers{{"input", params.input, result.input.size() * 4, false, false},
                                                {"output", params.output, result.output.size() * 4, true, false}};
    const auto watched = emulator::launch<Kernel>(name, {Kernel::kBlocksX, Kernel::kBlocksY}, params, buffers, options);
    if (!watched.problems.empty()) throw std::runtime_error(watched.problems.front());
    results.push_back(std::move(result));
  });
  return results;
}

}  // namespace shrank::conformance
