// select for linear layers, and what convolutions share with them: devices, tiles of the epilogue, names.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <set>
#include <string>
#include <vector>

#include "../select/backward_select.h"
#include "../select/epilogue_tile.h"
#include "../select/explain.h"
#include "../select/kernel_cost.h"
#include "../select/linear_cost.h"
#include "../select/linear_select.h"
#include "../select/shrink_expand_grid.h"
#include "select.h"

namespace py = pybind11;
using namespace py::literals;

namespace shrank {
namespace {

LinearProblem problem(int64_t M, int64_t K, int64_t N, int64_t R, const std::string& dtype,
                      const std::string& activation, bool bias, bool residual, bool training, bool aligned,
                      bool captured, int64_t gate_R, bool pivoted) {
  return {M,       K,        N,      R,      parse_dtype(dtype), parse_activation(activation), bias, residual, training,
          aligned, captured, gate_R, pivoted};
}

Device from_attributes_of(const std::string& name, int major, int minor, int sms, int clock_khz, int memory_clock_khz,
                          int bus_bits, int l2_bytes, int smem_per_block) {
  static std::set<std::string> names;  // a Device does not own its name
  return from_attributes(*names.insert(name).first, major, minor, sms, clock_khz, memory_clock_khz, bus_bits, l2_bytes,
                         smem_per_block);
}

template <typename Kernel, typename Choice>
void bind_choice(py::module_& m, const char* candidate, const char* choice) {
  py::class_<Candidate<Kernel>>(m, candidate)
      .def_property_readonly("kernel", [](const Candidate<Kernel>& c) { return name_of(c.kernel); })
      .def_readonly("why_not", &Candidate<Kernel>::why_not)
      .def_readonly("microseconds", &Candidate<Kernel>::microseconds);
  py::class_<Choice>(m, choice)
      .def_property_readonly("kernel", [](const Choice& c) { return name_of(c.kernel); })
      .def_readonly("microseconds", &Choice::microseconds)
      .def_readonly("reason", &Choice::reason)
      .def_readonly("grid", &Choice::grid);
}

}  // namespace

void bind_select_linear(py::module_ m) {
  py::class_<LinearProblem>(m, "LinearProblem")
      .def(py::init(&problem), "M"_a, "K"_a, "N"_a, "R"_a, "dtype"_a = "bfloat16", "activation"_a = "none",
           "bias"_a = false, "residual"_a = false, "training"_a = false, "aligned"_a = true, "captured"_a = false,
           "gate_R"_a = 0, "pivoted"_a = false)
      .def_readonly("M", &LinearProblem::M)
      .def_readonly("K", &LinearProblem::K)
      .def_readonly("N", &LinearProblem::N)
      .def_readonly("R", &LinearProblem::R)
      .def_readonly("gate_R", &LinearProblem::gate_R)
      .def_readonly("pivoted", &LinearProblem::pivoted)
      .def_readonly("bias", &LinearProblem::bias)
      .def_readonly("residual", &LinearProblem::residual)
      .def_readonly("training", &LinearProblem::training)
      .def_readonly("aligned", &LinearProblem::aligned)
      .def_readonly("captured", &LinearProblem::captured)
      .def_property_readonly("dtype", [](const LinearProblem& p) {
    return name_of(p.dtype);
  }).def_property_readonly("activation", [](const LinearProblem& p) { return name_of(p.activation); });

  py::class_<Device>(m, "Device")
      .def_static("from_attributes", &from_attributes_of, "name"_a, "major"_a, "minor"_a, "sms"_a, "clock_khz"_a,
                  "memory_clock_khz"_a, "bus_bits"_a, "l2_bytes"_a, "smem_per_block"_a)
      .def_readonly("name", &Device::name)
      .def_readonly("reported_name", &Device::reported_name)
      .def_readonly("arch", &Device::arch)
      .def_readonly("sms", &Device::sms)
      .def_readonly("bandwidth", &Device::bandwidth)
      .def_readonly("flops_half", &Device::flops_half)
      .def_readonly("flops_float32", &Device::flops_float32)
      .def_readonly("flops_float64", &Device::flops_float64)
      .def_readonly("l2_bytes", &Device::l2_bytes)
      .def_readonly("smem_per_block", &Device::smem_per_block)
      .def_readonly("launch_us", &Device::launch_us)
      .def_readonly("node_us", &Device::node_us)
      .def_readonly("source", &Device::source)
      .def("__repr__", [](const Device& d) { return "Device(" + std::string(d.name) + ")"; });

  bind_choice<LinearKernel, LinearChoice>(m, "LinearCandidate", "LinearChoice");
  bind_choice<BackwardKernel, BackwardChoice>(m, "BackwardCandidate", "BackwardChoice");

  py::class_<EpilogueTile>(m, "EpilogueTile")
      .def_readonly("vector", &EpilogueTile::vector)
      .def_readonly("threads_n", &EpilogueTile::threads_n)
      .def_readonly("threads_m", &EpilogueTile::threads_m)
      .def_readonly("blocks_n", &EpilogueTile::blocks_n)
      .def_readonly("blocks_m", &EpilogueTile::blocks_m);

  py::class_<LinearTile>(m, "LinearTile")
      .def(py::init([](int block_m, int max_rank, int form) {
    return LinearTile{block_m, max_rank, static_cast<Form>(form)};
  }),
           "block_m"_a, "max_rank"_a, "form"_a = number_of(Form::plain))
      .def_readonly("block_m", &LinearTile::block_m)
      .def_readonly("max_rank", &LinearTile::max_rank)
      .def_property_readonly("form", [](const LinearTile& tile) { return number_of(tile.form); })
      .def_property_readonly("pairs", &LinearTile::pairs)
      .def_property_readonly("holds_h", &LinearTile::holds_h)
      .def_property_readonly("threads", &LinearTile::threads)
      .def_property_readonly("down_stages", &LinearTile::down_stages)
      .def_property_readonly("up_stages", &LinearTile::up_stages)
      .def_property_readonly("shared_bytes", &LinearTile::shared_bytes)
      .def_property_readonly("expand_bytes", &LinearTile::expand_bytes)
      .def("__repr__", [](const LinearTile& tile) {
    return "LinearTile(" + std::to_string(tile.block_m) + ", " + std::to_string(tile.max_rank) +
           (tile.form == Form::plain ? ")" : ", form=" + std::to_string(number_of(tile.form)) + ")");
  });

  py::class_<LinearGrid>(m, "LinearGrid")
      .def(py::init(
               [](LinearTile tile, int64_t blocks_m, int blocks_n) { return LinearGrid{tile, blocks_m, blocks_n}; }),
           "tile"_a, "blocks_m"_a, "blocks_n"_a)
      .def_readonly("tile", &LinearGrid::tile)
      .def_readonly("blocks_m", &LinearGrid::blocks_m)
      .def_readonly("blocks_n", &LinearGrid::blocks_n);

  m.attr("LINEAR_TILES") = std::vector<LinearTile>(kLinearTiles.begin(), kLinearTiles.end());
  m.attr("PIVOTED_TILES") = std::vector<LinearTile>(kPivotedTiles.begin(), kPivotedTiles.end());
  m.attr("PIVOTED_BACKWARD_TILES") = std::vector<LinearTile>(kPivotedBackwardTiles.begin(),
                                                             kPivotedBackwardTiles.end());
  m.attr("GATED_TILES") = std::vector<LinearTile>(kGatedTiles.begin(), kGatedTiles.end());
  py::class_<ShrinkExpandTile>(m, "ShrinkExpandTile")
      .def_readonly("tokens", &ShrinkExpandTile::tokens)
      .def_property_readonly("form", [](const ShrinkExpandTile& tile) { return number_of(tile.form); })
      .def_property_readonly("pairs", &ShrinkExpandTile::pairs)
      .def_readonly("layers", &ShrinkExpandTile::layers)
      .def_property_readonly_static("MAX_RANK", [](const py::object&) { return ShrinkExpandTile::kMaxRank; })
      .def_property_readonly_static("SHRINK_THREADS",
                                    [](const py::object&) { return ShrinkExpandTile::kShrinkThreads; })
      .def_property_readonly_static("EXPAND_THREADS",
                                    [](const py::object&) { return ShrinkExpandTile::kExpandThreads; })
      .def_property_readonly("shrink_bytes", &ShrinkExpandTile::shrink_bytes)
      .def("expand_bytes_of", &ShrinkExpandTile::expand_bytes, "rank"_a)
      .def_property_readonly("expand_bytes", [](const ShrinkExpandTile& t) {
    return t.expand_bytes();
  }).def("__repr__", [](const ShrinkExpandTile& t) {
    return "ShrinkExpandTile(" + std::to_string(t.tokens) +
           (t.form != Form::plain ? ", form=" + std::to_string(number_of(t.form)) + ")"
            : t.layers > 1        ? ", layers=3)"
                                  : ")");
  });
  m.attr("SHRINK_EXPAND_TILES") = std::vector<ShrinkExpandTile>(kShrinkExpandTiles.begin(), kShrinkExpandTiles.end());
  m.def("bytes_in_flight", &bytes_in_flight, "problem"_a, "device"_a, "grid"_a);
  m.def("bytes_needed_in_flight", &bytes_needed_in_flight, "problem"_a, "device"_a);
  m.attr("BACKWARD_TILES") = std::vector<LinearTile>(kBackwardTiles.begin(), kBackwardTiles.end());
  m.attr("GATED_BACKWARD_TILES") = std::vector<LinearTile>(kGatedBackwardTiles.begin(), kGatedBackwardTiles.end());
  m.def("backward_sum_rows", &backward_sum_rows, "grid"_a);
  m.def("backward_candidates", &backward_candidates, "problem"_a, "device"_a);
  m.def("choose_backward", &choose_backward, "problem"_a, "device"_a);
  m.def("linear_why_not", [](const LinearProblem& p, const Device& d, bool fused) {
    return linear_why_not(p, d, fused);
  }, "problem"_a, "device"_a, "fused"_a);
  m.def("linear_grid", [](const LinearProblem& p, const Device& d, bool fused) {
    if (const char* why_not = linear_why_not(p, d, fused)) throw std::invalid_argument(why_not);
    return linear_grid(p, d, fused).grid;
  }, "problem"_a, "device"_a, "fused"_a);
  m.attr("ACTIVATIONS") = kActivationNames;
  m.attr("DTYPES") = kDtypeNames;
  m.def("devices", [] { return std::vector<Device>(kDevices.begin(), kDevices.end()); });
  m.def("device", &device_named, "name"_a);
  m.def("candidates", [](const LinearProblem& p, const Device& d) { return candidates(p, d); }, "problem"_a,
        "device"_a);
  m.def("select", [](const LinearProblem& p, const Device& d) { return shrank::select(p, d); }, "problem"_a,
        "device"_a);
  m.def("modelled", [](const LinearProblem& p, const Device& d) { return modelled(p, d); }, "problem"_a, "device"_a);
  m.def("floor_us", &floor_us, "problem"_a, "device"_a);
  m.def("dense_us", &dense_us, "problem"_a, "device"_a);
  m.def("epilogue_tile", &epilogue_tile, "problem"_a, "device"_a);
  py::class_<Phase>(m, "Phase")
      .def(py::init([](double slots, double products, double l1_bytes, double l2_bytes, double dram_bytes,
                       double wait_us) { return Phase{slots, products, l1_bytes, l2_bytes, dram_bytes, wait_us}; }),
           "slots"_a = 0, "products"_a = 0, "l1_bytes"_a = 0, "l2_bytes"_a = 0, "dram_bytes"_a = 0, "wait_us"_a = 0);
  m.def("kernel_us",
        [](int64_t blocks, int threads, int shared_bytes, double dram_bytes, const Phase& first, const Phase& second,
           const Device& d) { return kernel_us({blocks, threads, shared_bytes, dram_bytes}, {first, second}, d); },
        "blocks"_a, "threads"_a, "shared_bytes"_a, "dram_bytes"_a, "first"_a, "second"_a, "device"_a);
  m.def("resident_blocks", &resident_blocks, "threads"_a, "shared_bytes"_a, "device"_a);
  m.def("clock_hz", &clock_hz, "device"_a);
  m.def("explain", [](const LinearProblem& p, const Device& d) { return explain(p, d); }, "problem"_a, "device"_a);
}

}  // namespace shrank
