// (Problem, Device) -> which kernel, and why. No CUDA, no torch: runs on any machine.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "choose.h"
#include "device.h"
#include "linear_grid.h"
#include "problem.h"

namespace shrank {

// A new kernel is one value here, and in select.cpp one row and the functions it names.
enum class Kernel {
  fused,               // one kernel of ours from x to y
  gemm_expand,         // h by cuBLAS, then one kernel of ours: second product, bias, activation, residual
  two_gemms_epilogue,  // two cuBLAS GEMMs, the bias in the second, then one kernel of ours: activation, residual
  two_gemms,           // the same GEMMs, then PyTorch's own activation and residual kernels
};
inline constexpr int kKernelCount = 4;

std::string_view name_of(Kernel kernel);

struct KernelChoice {
  Kernel kernel;
  double microseconds;
  const char* reason;
  LinearGrid grid;  // of fused and gemm_expand; the others have none
};

std::array<Candidate<Kernel>, kKernelCount> candidates(const Problem& p, const Device& d);

// The cheapest candidate for training and inference together, so that a layer gives the same bits either way; of those
// that are slower than two GEMMs in neither.
KernelChoice select(const Problem& p, const Device& d);

// The same, remembered by the thread: a model asks of the same few problems again and again. Allocates nothing; a
// Device is known by its address.
const KernelChoice& recall(const Problem& p, const Device& d);

// What no kernel can beat: each input read once, each output written once, no FLOP wasted, no launch.
double floor_us(const Problem& p, const Device& d);

// The dense layer instead: one GEMM, then PyTorch's own activation and residual kernels.
double dense_us(const Problem& p, const Device& d);

// How the epilogue kernel covers y: a thread owns one vector of columns and strides over the rows.
//   column = (blockIdx.x * threads_n + threadIdx.x) * vector
//   row    = blockIdx.y * threads_m + threadIdx.y, then += blocks_m * threads_m
struct EpilogueTile {
  int vector;         // numbers per access: 16 bytes, or 1 number where rows are not aligned
  int threads_n;      // power of two, 8 to 256
  int threads_m;      // threads_n * threads_m = 256
  int64_t blocks_n;   // gridDim.x; 0 if y is empty
  int64_t blocks_m;   // gridDim.y, at most 65535; 0 if y is empty
};

EpilogueTile epilogue_tile(const Problem& p, const Device& d);

}  // namespace shrank
