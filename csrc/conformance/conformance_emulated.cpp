#include "conformance_emulated.h"

#include <stdexcept>

#include "conformance.cuh"

namespace shrank::conformance {

std::vector<Result> run_emulated(const emulator::Options& options) {
  std::vector<Result> results;
  for_each_case([&](const char* name, auto kernel) {
    using Kernel = decltype(kernel);
    Result result{name, inputs_of(Kernel::kInputs, Kernel::kInputWords),
                  std::vector<uint32_t>(Kernel::kOutputWords, kUntouched)};
    const Params params{result.input.data(), result.output.data()};
    const std::vector<emulator::Buffer> buffers{{"input", params.input, result.input.size() * 4, false, false},
                                                {"output", params.output, result.output.size() * 4, true, false}};
    const auto watched = emulator::launch<Kernel>(name, {Kernel::kBlocksX, Kernel::kBlocksY}, params, buffers, options);
    if (!watched.problems.empty()) throw std::runtime_error(watched.problems.front());
    results.push_back(std::move(result));
  });
  return results;
}

}  // namespace shrank::conformance
