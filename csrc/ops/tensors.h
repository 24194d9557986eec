// What the ops ask of tensors and make of them, on the LibTorch stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "../select/vocabulary.h"

namespace shrank {

using torch::stable::Tensor;

// What shall run, instead of what select would choose.
struct Named {
  bool training;
  std::string_view kernel;
  const std::vector<int64_t>& grid;  // block_m, max_rank and blocks_n, or nothing
};

// "[2, 3]"
std::string shape(const Tensor& tensor);
std::string shape(const std::vector<int64_t>& sizes);

// What `choose` gives; if it refuses (std::invalid_argument), an error that names the op.
template <typename Choose> auto chosen_for(const char* op, const Choose& choose) {
  try {
    return choose();
  } catch (const std::invalid_argument& error) {
    STD_TORCH_CHECK(false, op, ": ", error.what());
  }
}

// The element type, if it is one of ours; else an error that names the op.
Dtype dtype_of(const char* op, const Tensor& x, const char* name = "x");

// An error unless the tensor has the element type of x and lies on its device.
void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& x);

// An error unless the tensor is of int32 and lies on the device of x.
void check_int32(const char* op, const char* name, const Tensor& tensor, const Tensor& x);

// An error unless the residual is as a y of N columns, made of x.
void check_residual(const char* op, const Tensor& residual, const Tensor& x, int64_t N);

// The activation of that name; else an error that names the op.
Activation activation_of(const char* op, std::string_view name);

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// As the matrix kernels want it: row-major without gaps, from a multiple of 16 bytes on.
inline bool is_plain(const Tensor& tensor) { return tensor.is_contiguous() && aligned(tensor.const_data_ptr()); }
inline bool is_plain(const std::optional<Tensor>& tensor) { return !tensor || is_plain(*tensor); }

inline const void* data_of(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
inline void* mutable_data_of(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->mutable_data_ptr() : nullptr;
}

// One of torch's operators, and which of those of its name.
struct Operator { const char *name, *overload; };

// An operator with one result through torch's dispatcher: with PyTorch's own choices, any shape and stride.
template <typename... Arguments> Tensor call_aten(const Operator& of, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(of.name, of.overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}
template <typename... Arguments> Tensor call_aten(const char* name, const Arguments&... arguments) {
  return call_aten(Operator{name, ""}, arguments...);
}

// By cuBLAS, with PyTorch's own choices (TF32, determinism, workspaces).
inline Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  return call_aten("aten::linear", x, weight, bias);
}

inline Tensor product(const Tensor& a, const Tensor& b) { return call_aten(Operator{"aten::mul", "Tensor"}, a, b); }

// Of x (..., columns) as a matrix.
inline int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); i++) rows *= x.size(i);
  return rows;
}

// Whether one (..., columns) has as many rows as another, along every dimension.
inline bool has_rows_of(const Tensor& one, const Tensor& other) {
  bool fits = one.dim() == other.dim();
  for (int64_t i = 0; fits && i + 1 < one.dim(); i++) fits = one.size(i) == other.size(i);
  return fits;
}

// (..., columns) like x, unwritten: half of the time of new_empty, which goes through torch's dispatcher twice.
Tensor rows_like(const Tensor& x, int64_t columns);

}  // namespace shrank
