// For C++ programs, where no Python registers the ops.
#include <torch/csrc/stable/library.h>

// The schemas of shrank/ops, which defines them only where this has not; tests/ops/test_law.py compares them.
STABLE_TORCH_LIBRARY_FRAGMENT(shrank, library) {
  library.def(
      "low_rank_linear(Tensor x, Tensor down, Tensor up, Tensor? bias=None, str activation='none', "
      "Tensor? residual=None) -> Tensor");
  library.def(
      "low_rank_linear_train(Tensor x, Tensor down, Tensor up, Tensor? bias=None, str activation='none', "
      "Tensor? residual=None) -> (Tensor y, Tensor h)");
  library.def(
      "low_rank_conv(Tensor x, Tensor down, Tensor up, Tensor? bias, int[] stride, int[] padding, "
      "int[] dilation, int groups=1, int up_groups=1, str activation='none', Tensor? residual=None) -> Tensor");
  library.def(
      "low_rank_conv_train(Tensor x, Tensor down, Tensor up, Tensor? bias, int[] stride, int[] padding, "
      "int[] dilation, int groups=1, int up_groups=1, str activation='none', Tensor? residual=None) -> "
      "(Tensor y, Tensor h)");
  library.def(
      "low_rank_linear_multi(Tensor x, Tensor[] down, Tensor[] up, Tensor?[] bias, Tensor?[] pivot_bias, "
      "Tensor?[] order) -> Tensor[]");
  library.def(
      "low_rank_gated(Tensor x, Tensor gate_down, Tensor gate_up, Tensor? gate_bias, Tensor down, Tensor up, "
      "Tensor? bias=None, Tensor? gate_pivot_bias=None, Tensor? gate_order=None, Tensor? pivot_bias=None, "
      "Tensor? order=None, str activation='silu') -> Tensor");
  library.def(
      "low_rank_gated_train(Tensor x, Tensor gate_down, Tensor gate_up, Tensor? gate_bias, Tensor down, Tensor up, "
      "Tensor? bias=None, Tensor? gate_pivot_bias=None, Tensor? gate_order=None, Tensor? pivot_bias=None, "
      "Tensor? order=None, str activation='silu') -> (Tensor y, Tensor gate_h, Tensor h)");
  library.def(
      "low_rank_pivoted(Tensor x, Tensor down, Tensor up, Tensor? bias, Tensor? pivot_bias, Tensor order, "
      "str activation='none', Tensor? residual=None) -> Tensor");
  library.def(
      "low_rank_pivoted_train(Tensor x, Tensor down, Tensor up, Tensor? bias, Tensor? pivot_bias, Tensor order, "
      "str activation='none', Tensor? residual=None) -> (Tensor y, Tensor h)");
  library.def(
      "expand_backward(Tensor grad, Tensor h, Tensor up, Tensor? bias, str activation, bool needs_bias) -> "
      "(Tensor z, Tensor bias)");
  library.def(
      "gated_backward(Tensor grad, Tensor gate_h, Tensor gate_up, Tensor? gate_bias, Tensor h, Tensor up, "
      "Tensor? bias, str activation, bool needs_gate_bias, bool needs_bias) -> "
      "(Tensor gate, Tensor value, Tensor gate_bias, Tensor bias)");
  library.def(
      "pivoted_backward(Tensor grad, Tensor h, Tensor up, Tensor? bias, Tensor? pivot_bias, Tensor order, "
      "str activation, bool needs_bias) -> (Tensor z, Tensor bias)");
}
