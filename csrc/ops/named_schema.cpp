// The ops that run what a caller names, and that list what he may name: for tests, the self-check and the tuner. Python
// knows them only where this was loaded, so that their schemas stand here alone.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(shrank, library) {
  library.def(
      "low_rank_linear_as(Tensor x, Tensor down, Tensor up, Tensor? bias, str activation, Tensor? residual, "
      "bool training, str kernel, int[] grid) -> (Tensor y, Tensor h)");
  library.def(
      "low_rank_conv_as(Tensor x, Tensor down, Tensor up, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
      "int groups, int up_groups, str activation, Tensor? residual, bool training, str kernel, int[] grid) -> "
      "(Tensor y, Tensor h)");
  library.def(
      "expand_backward_as(Tensor grad, Tensor h, Tensor up, Tensor? bias, str activation, bool needs_bias, str kernel, "
      "int[] grid) -> (Tensor z, Tensor bias)");
  library.def(
      "low_rank_linear_multi_as(Tensor x, Tensor[] down, Tensor[] up, Tensor?[] bias, Tensor?[] pivot_bias, "
      "Tensor?[] order, int tokens, int[] splits) -> Tensor[]");
  library.def(
      "low_rank_gated_as(Tensor x, Tensor gate_down, Tensor gate_up, Tensor? gate_bias, Tensor down, Tensor up, "
      "Tensor? bias, Tensor? gate_pivot_bias, Tensor? gate_order, Tensor? pivot_bias, Tensor? order, str activation, "
      "bool training, str kernel, int[] grid) -> (Tensor y, Tensor gate_h, Tensor h)");
  library.def(
      "gated_backward_as(Tensor grad, Tensor gate_h, Tensor gate_up, Tensor? gate_bias, Tensor h, Tensor up, "
      "Tensor? bias, str activation, bool needs_gate_bias, bool needs_bias, str kernel, int[] grid) -> "
      "(Tensor gate, Tensor value, Tensor gate_bias, Tensor bias)");
  library.def(
      "low_rank_pivoted_as(Tensor x, Tensor down, Tensor up, Tensor? bias, Tensor? pivot_bias, Tensor order, "
      "str activation, Tensor? residual, bool training, str kernel, int[] grid) -> (Tensor y, Tensor h)");
  library.def(
      "pivoted_backward_as(Tensor grad, Tensor h, Tensor up, Tensor? bias, Tensor? pivot_bias, Tensor order, "
      "str activation, bool needs_bias, str kernel, int[] grid) -> (Tensor z, Tensor bias)");
  library.def(
      "low_rank_pivoted_choices(Tensor x, Tensor down, Tensor up, Tensor? bias, Tensor? pivot_bias, Tensor order, "
      "str activation, Tensor? residual, int most) -> str");
  library.def(
      "low_rank_gated_choices(Tensor x, Tensor gate_down, Tensor gate_up, Tensor? gate_bias, Tensor down, Tensor up, "
      "Tensor? bias, Tensor? gate_pivot_bias, Tensor? gate_order, Tensor? pivot_bias, Tensor? order, str activation, "
      "int most) -> str");
  library.def(
      "low_rank_linear_choices(Tensor x, Tensor down, Tensor up, Tensor? bias, str activation, Tensor? residual, "
      "int most) -> str");
  library.def(
      "low_rank_conv_choices(Tensor x, Tensor down, Tensor up, Tensor? bias, int[] stride, int[] padding, "
      "int[] dilation, int groups, int up_groups, str activation, Tensor? residual, int most) -> str");
}
