#include "hopper_kernels.h"

#include <array>
#include <stdexcept>
#include <utility>

#include "hopper_kernels.cuh"

namespace shrank::tests {
namespace {

constexpr std::array kMistakes{
    std::pair{"none", Mistake::none},
    std::pair{"no_barrier_fence", Mistake::no_barrier_fence},
    std::pair{"no_sync_after_init", Mistake::no_sync_after_init},
    std::pair{"wrong_parity", Mistake::wrong_parity},
    std::pair{"no_wait_for_empty", Mistake::no_wait_for_empty},
    std::pair{"too_few_bytes", Mistake::too_few_bytes},
    std::pair{"no_wait_for_full", Mistake::no_wait_for_full},
    std::pair{"wrong_column_step", Mistake::wrong_column_step},
    std::pair{"early_release", Mistake::early_release},
};

template <typename T, std::size_t... I>
emulator::Result run(const std::string& mistake, const ProductParams& params,
                     const std::vector<emulator::Buffer>& buffers, const emulator::Options& options,
                     std::index_sequence<I...>) {
  constexpr int kTile = TiledProduct<T>::kTile;
  const emulator::Index3 grid{static_cast<unsigned>((params.N + kTile - 1) / kTile),
                              static_cast<unsigned>((params.M + kTile - 1) / kTile), 1};
  emulator::Result result;
  const auto launch = [&](auto kernel) {
    result = emulator::launch<decltype(kernel)>("tiled_product", grid, params, buffers, options);
    return true;
  };
  const bool found = ((mistake == kMistakes[I].first && launch(TiledProduct<T, kMistakes[I].second>{})) || ...);
  if (!found) throw std::invalid_argument("no mistake is called " + mistake);
  return result;
}

}  // namespace

std::vector<std::string> mistakes() {
  std::vector<std::string> names;
  for (const auto& [name, mistake] : kMistakes) names.push_back(name);
  return names;
}

emulator::Result tiled_product(const std::string& mistake, const std::string& dtype, int M, int N, int K, const void* a,
                               const void* b, void* c, const emulator::Options& options) {
  const auto map = [&](const void* base, int rows) { return arch::TensorMap{base, K, rows, int64_t{K} * 2, 64, 64}; };
  const auto bytes = [](int rows, int columns) { return static_cast<std::size_t>(rows) * columns * 2; };
  const ProductParams params{map(a, M), map(b, N), c, M, N, K};
  const std::vector<emulator::Buffer> buffers{{"a", a, bytes(M, K), false, false},
                                              {"b", b, bytes(N, K), false, false},
                                              {"c", c, bytes(M, N), true, false}};
  constexpr std::make_index_sequence<kMistakes.size()> all;
  if (dtype == "bfloat16") return run<arch::bfloat16>(mistake, params, buffers, options, all);
  if (dtype == "float16") return run<arch::float16>(mistake, params, buffers, options, all);
  throw std::invalid_argument("the tensor cores here take float16 and bfloat16");
}

}  // namespace shrank::tests
