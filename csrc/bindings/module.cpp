// shrank_dev: the parts that need no GPU, for tests and developers. Not in any wheel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <set>
#include <string>
#include <vector>

#include "../select/explain.h"
#include "../select/select.h"
#include "conformance.h"
#include "conv.h"
#include "emulator.h"
#include "hopper.h"
#include "linear.h"

namespace py = pybind11;
using namespace py::literals;

namespace shrank {
namespace {

Problem problem(int64_t M, int64_t K, int64_t N, int64_t R, const std::string& dtype, const std::string& activation,
                bool bias, bool residual, bool training, bool aligned) {
  return {M, K, N, R, parse_dtype(dtype), parse_activation(activation), bias, residual, training, aligned};
}

Device from_attributes_of(const std::string& name, int major, int minor, int sms, int clock_khz, int memory_clock_khz,
                          int bus_bits, int l2_bytes, int smem_per_block) {
  static std::set<std::string> names;  // a Device does not own its name
  return from_attributes(*names.insert(name).first, major, minor, sms, clock_khz, memory_clock_khz, bus_bits, l2_bytes,
                         smem_per_block);
}

void bind_select(py::module_ m) {
  py::class_<Problem>(m, "Problem")
      .def(py::init(&problem), "M"_a, "K"_a, "N"_a, "R"_a, "dtype"_a = "bfloat16", "activation"_a = "none",
           "bias"_a = false, "residual"_a = false, "training"_a = false, "aligned"_a = true)
      .def_readonly("M", &Problem::M)
      .def_readonly("K", &Problem::K)
      .def_readonly("N", &Problem::N)
      .def_readonly("R", &Problem::R)
      .def_readonly("bias", &Problem::bias)
      .def_readonly("residual", &Problem::residual)
      .def_readonly("training", &Problem::training)
      .def_readonly("aligned", &Problem::aligned)
      .def_property_readonly("dtype", [](const Problem& p) { return name_of(p.dtype); })
      .def_property_readonly("activation", [](const Problem& p) {
    return name_of(p.activation);
  }).def_property_readonly("keeps_preactivation", &keeps_preactivation);

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

  py::class_<Candidate<Kernel>>(m, "Candidate")
      .def_property_readonly("kernel", [](const Candidate<Kernel>& c) { return name_of(c.kernel); })
      .def_readonly("why_not", &Candidate<Kernel>::why_not)
      .def_readonly("microseconds", &Candidate<Kernel>::microseconds);

  py::class_<KernelChoice>(m, "KernelChoice")
      .def_property_readonly("kernel", [](const KernelChoice& c) { return name_of(c.kernel); })
      .def_readonly("microseconds", &KernelChoice::microseconds)
      .def_readonly("reason", &KernelChoice::reason)
      .def_readonly("grid", &KernelChoice::grid);

  py::class_<EpilogueTile>(m, "EpilogueTile")
      .def_readonly("vector", &EpilogueTile::vector)
      .def_readonly("threads_n", &EpilogueTile::threads_n)
      .def_readonly("threads_m", &EpilogueTile::threads_m)
      .def_readonly("blocks_n", &EpilogueTile::blocks_n)
      .def_readonly("blocks_m", &EpilogueTile::blocks_m);

  py::class_<LinearTile>(m, "LinearTile")
      .def(py::init([](int block_m, int max_rank) { return LinearTile{block_m, max_rank}; }), "block_m"_a, "max_rank"_a)
      .def_readonly("block_m", &LinearTile::block_m)
      .def_readonly("max_rank", &LinearTile::max_rank)
      .def_property_readonly("holds_h", &LinearTile::holds_h)
      .def_property_readonly("threads", &LinearTile::threads)
      .def_property_readonly("down_stages", &LinearTile::down_stages)
      .def_property_readonly("up_stages", &LinearTile::up_stages)
      .def_property_readonly("shared_bytes", &LinearTile::shared_bytes)
      .def("__repr__", [](const LinearTile& tile) {
    return "LinearTile(" + std::to_string(tile.block_m) + ", " + std::to_string(tile.max_rank) + ")";
  });

  py::class_<LinearGrid>(m, "LinearGrid")
      .def(py::init(
               [](LinearTile tile, int64_t blocks_m, int blocks_n) { return LinearGrid{tile, blocks_m, blocks_n}; }),
           "tile"_a, "blocks_m"_a, "blocks_n"_a)
      .def_readonly("tile", &LinearGrid::tile)
      .def_readonly("blocks_m", &LinearGrid::blocks_m)
      .def_readonly("blocks_n", &LinearGrid::blocks_n);

  m.attr("LINEAR_TILES") = std::vector<LinearTile>(kLinearTiles.begin(), kLinearTiles.end());
  m.def("linear_why_not", &linear_why_not, "problem"_a, "device"_a, "fused"_a);
  m.def("linear_grid", [](const Problem& p, const Device& d, bool fused) {
    if (const char* why_not = linear_why_not(p, d, fused)) throw std::invalid_argument(why_not);
    return linear_grid(p, d, fused).grid;
  }, "problem"_a, "device"_a, "fused"_a);
  m.attr("ACTIVATIONS") = kActivationNames;
  m.attr("DTYPES") = kDtypeNames;
  m.def("devices", [] { return std::vector<Device>(kDevices.begin(), kDevices.end()); });
  m.def("device", &device_named, "name"_a);
  m.def("candidates", [](const Problem& p, const Device& d) { return candidates(p, d); }, "problem"_a, "device"_a);
  m.def("select", [](const Problem& p, const Device& d) { return shrank::select(p, d); }, "problem"_a, "device"_a);
  m.def("floor_us", &floor_us, "problem"_a, "device"_a);
  m.def("dense_us", &dense_us, "problem"_a, "device"_a);
  m.def("epilogue_tile", &epilogue_tile, "problem"_a, "device"_a);
  m.def("explain", [](const Problem& p, const Device& d) { return explain(p, d); }, "problem"_a, "device"_a);
}

}  // namespace
}  // namespace shrank

PYBIND11_MODULE(shrank_dev, m) {
  py::module_ select = m.def_submodule("select", "(Problem, Device) -> kernel");
  shrank::bind_select(select);
  shrank::bind_select_conv(select);
  shrank::bind_emulator(m.def_submodule("emulator", "kernels on a CPU, watched"));
  shrank::bind_linear(m.def_submodule("linear", "the matrix kernels in the emulator"));
  shrank::bind_conv(m.def_submodule("conv", "the convolution kernels in the emulator"));
  shrank::bind_hopper(m.def_submodule("hopper", "kernels for sm_90a in the emulator"));
  shrank::bind_conformance(m.def_submodule("conformance", "every instruction of csrc/arch in the emulator"));
}
