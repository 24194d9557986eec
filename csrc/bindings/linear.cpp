// The matrix kernels for tests: tensors by their addresses.
#include "linear.h"

#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "../kernels/expand_backward_emulated.h"
#include "../kernels/low_rank_linear_emulated.h"
#include "../kernels/shrink_expand_emulated.h"

namespace py = pybind11;
using namespace py::literals;

namespace shrank {
namespace {

using Address = std::uintptr_t;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

// A pair of factors: R, and addresses by their names.
using Given = std::map<std::string, Address>;

void* pointer(const Given& given, const char* name) {
  const auto found = given.find(name);
  return found == given.end() ? nullptr : pointer(found->second);
}

Pair pair_of(const Given& given) {
  return {pointer(given, "down"),
          pointer(given, "up"),
          pointer(given, "bias"),
          pointer(given, "h"),
          static_cast<int>(given.at("R")),
          pointer(given, "pivot_bias"),
          static_cast<const int32_t*>(pointer(given, "order"))};
}

// One, or gate and value.
void read(const std::vector<Given>& given, Pair (&pairs)[2]) {
  for (std::size_t i = 0; i < given.size(); i++) pairs[i] = pair_of(given[i]);
}

emulator::Result emulate(const LinearGrid& grid, int64_t M, int K, int N, const std::vector<Given>& pairs,
                         const std::string& dtype, const std::string& activation, Address x, Address residual,
                         Address y, uint64_t seed, bool copies_early) {
  LowRankLinearParams params{
      pointer(x), {}, pointer(residual), pointer(y), M, K, N, parse_dtype(dtype), parse_activation(activation)};
  read(pairs, params.pair);
  return emulate_low_rank_linear(params, grid, {seed, copies_early});
}

emulator::Result emulate_backward(const LinearGrid& grid, int64_t M, int N, const std::vector<Given>& pairs,
                                  const std::string& dtype, const std::string& activation, Address grad, uint64_t seed,
                                  bool copies_early) {
  ExpandBackwardParams params{{}, pointer(grad), {}, {}, M, N, parse_dtype(dtype), parse_activation(activation)};
  read(pairs, params.pair);
  for (std::size_t i = 0; i < pairs.size(); i++) {
    params.dz[i] = pointer(pairs[i], "dz");
    params.sums[i] = static_cast<float*>(pointer(pairs[i], "sums"));
  }
  return emulate_expand_backward(params, grid, {seed, copies_early});
}

// Each pair has N, y and splits: those of its layer, of which there are `layers`.
emulator::Result emulate_few_rows(int tokens, int M, int K, const std::vector<Given>& pairs, int layers,
                                  const std::string& dtype, const std::string& activation, Address x, Address residual,
                                  uint64_t seed) {
  ShrinkExpandParams params{};
  params.x = pointer(x);
  params.residual = pointer(residual);
  params.M = M;
  params.K = K;
  params.dtype = parse_dtype(dtype);
  params.activation = parse_activation(activation);
  const int pairs_of_layer = static_cast<int>(pairs.size()) / layers;
  bool pivoted = false;
  for (std::size_t i = 0; i < pairs.size(); i++) {
    const Given& of = pairs[i];
    static_cast<Pair&>(params.pair[i]) = pair_of(of);
    pivoted = pivoted || params.pair[i].order;
    params.pair[i].sums = static_cast<float*>(pointer(of, "sums"));
    params.pair[i].splits = static_cast<int>(of.at("splits"));
    params.y[i / pairs_of_layer] = pointer(of, "y");
    params.N[i / pairs_of_layer] = static_cast<int>(of.at("N"));
  }
  const Form plain = pairs_of_layer == 2 ? Form::gated : Form::plain;
  const Form form = !pivoted ? plain : plain == Form::gated ? Form::gated_pivoted : Form::pivoted;
  const ShrinkExpandTile tile{tokens, form, layers > 1 ? ShrinkExpandTile::kMostLayers : 1};
  return emulate_shrink_expand(params, tile, {seed, false});
}

}  // namespace

void bind_linear(py::module_ m) {
  m.def("emulate", &emulate, "grid"_a, "M"_a, "K"_a, "N"_a, "pairs"_a, "dtype"_a, "activation"_a, "x"_a = 0,
        "residual"_a = 0, "y"_a, "seed"_a = 0, "copies_early"_a = false);
  m.def("emulate_few_rows", &emulate_few_rows, "tokens"_a, "M"_a, "K"_a, "pairs"_a, "layers"_a, "dtype"_a,
        "activation"_a, "x"_a, "residual"_a = 0, "seed"_a = 0);
  m.def("emulate_backward", &emulate_backward, "grid"_a, "M"_a, "N"_a, "pairs"_a, "dtype"_a, "activation"_a, "grad"_a,
        "seed"_a = 0, "copies_early"_a = false);
}

}  // namespace shrank
