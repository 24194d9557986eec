// What select knows of convolutions, for tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../select/conv_cost.h"
#include "../select/conv_select.h"
#include "../select/explain.h"
#include "select.h"

namespace py = pybind11;
using namespace py::literals;

namespace shrank {
namespace {

ConvProblem problem(int64_t batch, int64_t C, int64_t N, int64_t R, const Size3& in, const Size3& kernel,
                    const Size3& stride, const Size3& begin, const Size3& end, const Size3& dilation, int64_t groups,
                    int64_t up_groups, const std::string& dtype, const std::string& activation, bool bias,
                    bool residual, bool training, bool channels_last) {
  return {batch,
          C,
          N,
          R,
          in,
          kernel,
          stride,
          begin,
          end,
          dilation,
          groups,
          up_groups,
          parse_dtype(dtype),
          parse_activation(activation),
          bias,
          residual,
          training,
          channels_last};
}

ConvTile tile(const std::string& gather, int block_m, int max_rank) {
  for (std::size_t i = 0; i < kGatherNames.size(); i++)
    if (kGatherNames[i] == gather) return {static_cast<Gather>(i), {block_m, max_rank}};
  throw std::invalid_argument(unknown_name("gather", gather, kGatherNames));
}

}  // namespace

void bind_select_conv(py::module_ m) {
  const Size3 ones{1, 1, 1}, zeros{};
  py::class_<ConvProblem>(m, "ConvProblem")
      .def(py::init(&problem), "batch"_a, "C"_a, "N"_a, "R"_a, "input"_a, "kernel"_a, "stride"_a = ones,
           "begin"_a = zeros, "end"_a = zeros, "dilation"_a = ones, "groups"_a = 1, "up_groups"_a = 1,
           "dtype"_a = "bfloat16", "activation"_a = "none", "bias"_a = false, "residual"_a = false,
           "training"_a = false, "channels_last"_a = true)
      .def_property_readonly("out", &ConvProblem::out)
      .def_property_readonly("pixels", &ConvProblem::pixels)
      .def_property_readonly("K", &ConvProblem::K)
      .def_readonly("R", &ConvProblem::R)
      .def_readonly("N", &ConvProblem::N);

  py::class_<ConvTile>(m, "ConvTile")
      .def(py::init(&tile), "gather"_a, "block_m"_a, "max_rank"_a)
      .def_property_readonly("gather", [](const ConvTile& t) { return name_of(t.gather); })
      .def_property_readonly("block_m", [](const ConvTile& t) { return t.tile.block_m; })
      .def_property_readonly("max_rank", [](const ConvTile& t) { return t.tile.max_rank; })
      .def_property_readonly("threads", [](const ConvTile& t) { return t.tile.threads(); })
      .def_property_readonly("down_stages", [](const ConvTile& t) { return t.tile.down_stages(); })
      .def_property_readonly("shared_bytes", &ConvTile::shared_bytes)
      .def("__repr__", [](const ConvTile& t) {
    return "ConvTile(" + std::string(name_of(t.gather)) + ", " + std::to_string(t.tile.block_m) + ", " +
           std::to_string(t.tile.max_rank) + ")";
  });

  py::class_<ConvGrid>(m, "ConvGrid")
      .def(py::init([](ConvTile tile, int64_t blocks_m, int blocks_n) { return ConvGrid{tile, blocks_m, blocks_n}; }),
           "tile"_a, "blocks_m"_a, "blocks_n"_a)
      .def_readonly("tile", &ConvGrid::tile)
      .def_readonly("blocks_m", &ConvGrid::blocks_m)
      .def_readonly("blocks_n", &ConvGrid::blocks_n);

  py::class_<Candidate<ConvKernel>>(m, "ConvCandidate")
      .def_property_readonly("kernel", [](const Candidate<ConvKernel>& c) { return name_of(c.kernel); })
      .def_readonly("why_not", &Candidate<ConvKernel>::why_not)
      .def_readonly("microseconds", &Candidate<ConvKernel>::microseconds);

  py::class_<ConvChoice>(m, "ConvChoice")
      .def_property_readonly("kernel", [](const ConvChoice& c) { return name_of(c.kernel); })
      .def_readonly("microseconds", &ConvChoice::microseconds)
      .def_readonly("reason", &ConvChoice::reason)
      .def_readonly("grid", &ConvChoice::grid)
      .def_readonly("expand_grid", &ConvChoice::expand_grid);

  m.def("explain", [](const ConvProblem& p, const Device& d) { return explain(p, d); }, "problem"_a, "device"_a);
  m.def("conv_why_not", [](const ConvProblem& p, const Device& d) { return conv_why_not(p, d); }, "problem"_a,
        "device"_a);
  m.def("conv_grid", [](const ConvProblem& p, const Device& d) {
    if (const char* why_not = conv_why_not(p, d)) throw std::invalid_argument(why_not);
    return conv_grid(p, d).grid;
  }, "problem"_a, "device"_a);
  m.def("candidates", [](const ConvProblem& p, const Device& d) { return candidates(p, d); }, "problem"_a, "device"_a);
  m.def("select", [](const ConvProblem& p, const Device& d) { return select(p, d); }, "problem"_a, "device"_a);
  m.def("floor_us", [](const ConvProblem& p, const Device& d) { return floor_us(p, d); }, "problem"_a, "device"_a);
  m.def("dense_us", [](const ConvProblem& p, const Device& d) { return dense_us(p, d); }, "problem"_a, "device"_a);
  m.attr("CONV_TILES") = std::vector<ConvTile>(kConvTiles.begin(), kConvTiles.end());
}

}  // namespace shrank
