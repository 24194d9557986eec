// What convolutions cost on a GPU, by the same model as cost.h.
#pragma once

#include "conv_problem.h"
#include "device.h"

namespace shrank {

// cuDNN's two convolutions, channels last, in a replayed graph; the bias is in the second.
double two_convs_us(const ConvProblem& p, const Device& d);

// The first of them.
double first_conv_us(const ConvProblem& p, const Device& d);

// The dense convolution instead, then PyTorch's own activation and residual kernels.
double dense_us(const ConvProblem& p, const Device& d);

// As floor_us of a linear layer: x and y, the weights, and what training keeps, each moved once; no FLOP wasted.
double floor_us(const ConvProblem& p, const Device& d);

// A filter's product with one channel of one tap, on CUDA cores: a conversion, a multiplication, and a share of the
// loads and their addresses. Counted in the kernel here (csrc/kernels/depthwise.cuh), assumed of cuDNN's.
inline constexpr double kDepthwiseInstructions = 3;

// Instructions that all SMs execute in a second, by thread: one for two FLOPs.
inline double instruction_rate(const Device& d) { return d.flops_float32 / 2; }

}  // namespace shrank
