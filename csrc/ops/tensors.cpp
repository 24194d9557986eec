#include "tensors.h"

#include <algorithm>
#include <sstream>

namespace shrank {
namespace {

using torch::headeronly::DeviceType;

// "cuda:1", as Python says it.
std::string name_of(const torch::stable::Device& device) {
  std::string name;
  switch (device.type()) {
    case DeviceType::CPU: name = "cpu"; break;
    case DeviceType::CUDA: name = "cuda"; break;
    case DeviceType::Meta: name = "meta"; break;
    default: name = "a device of type " + std::to_string(static_cast<int>(device.type()));
  }
  return device.index() < 0 ? name : name + ":" + std::to_string(device.index());
}

}  // namespace

using torch::headeronly::ScalarType;

std::string shape(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  const char* separator = "[";
  for (const int64_t size : sizes) {
    text << separator << size;
    separator = ", ";
  }
  text << (sizes.empty() ? "[]" : "]");
  return text.str();
}

std::string shape(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return shape(std::vector<int64_t>(sizes.begin(), sizes.end()));
}

Tensor rows_like(const Tensor& x, int64_t columns) {
  const int64_t dims = x.dim();
  std::vector<int64_t> sizes(2 * dims);
  int64_t* const strides = sizes.data() + dims;
  for (int64_t i = 0; i < dims; i++) sizes[i] = x.size(i);
  sizes[dims - 1] = columns;
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= 0; i--) {
    strides[i] = stride;
    stride *= std::max<int64_t>(1, sizes[i]);
  }
  int32_t dtype, type, index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &index));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes.data(), strides, dtype, type, index, &made));
  return Tensor(made);
}

Dtype dtype_of(const char* op, const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Double: return Dtype::float64;
    default: break;
  }
  STD_TORCH_CHECK(false, op, ": ", name, " is ", torch::headeronly::toString(x.scalar_type()),
                  ", wanted float32, float16, bfloat16 or float64");
}

namespace {

void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  STD_TORCH_CHECK(tensor.device() == x.device(), op, ": ", name, " is on ", name_of(tensor.device()), ", wanted the ",
                  name_of(x.device()), " of x");
}

}  // namespace

void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), op, ": ", name, " is ",
                  torch::headeronly::toString(tensor.scalar_type()), ", wanted the ",
                  torch::headeronly::toString(x.scalar_type()), " of x");
  check_device(op, name, tensor, x);
}

void check_int32(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  STD_TORCH_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Int, op, ": ", name, " is ",
                  torch::headeronly::toString(tensor.scalar_type()), ", wanted Int");
  check_device(op, name, tensor, x);
}

void check_residual(const char* op, const Tensor& residual, const Tensor& x, int64_t N) {
  const bool fits = has_rows_of(residual, x) && residual.size(x.dim() - 1) == N;
  STD_TORCH_CHECK(fits, op, ": residual is ", shape(residual), ", wanted the shape of x ", shape(x), " with ", N,
                  " columns");
  check_like(op, "residual", residual, x);
}

Activation activation_of(const char* op, std::string_view name) {
  return chosen_for(op, [&] { return parse_activation(name); });
}

}  // namespace shrank
