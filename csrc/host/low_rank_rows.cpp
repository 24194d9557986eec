// shrank::low_rank_rows: a low-rank layer of a few rows of x on a CPU, in inference (shrank/ops/host.py says when).
#include <algorithm>
#include <memory>

#include "../ops/tensors.h"
#include "few_rows.h"

namespace shrank::host {
namespace {

constexpr const char* kOp = "shrank::low_rank_rows";
constexpr int64_t kFewestProducts = 1 << 14;  // that are worth another thread

void check_vector(const char* name, const std::optional<Tensor>& tensor, const Tensor& x, int64_t size) {
  if (!tensor) return;
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == size, kOp, ": ", name, " is ", shape(*tensor), ", wanted (",
                  size, ")");
  check_like(kOp, name, *tensor, x);
}

void check_order(const Tensor& order, const Tensor& x) {
  STD_TORCH_CHECK(order.dim() == 1, kOp, ": order is ", shape(order), ", wanted (N)");
  check_int32(kOp, "order", order, x);
  const auto* places = static_cast<const int32_t*>(order.const_data_ptr());
  const int64_t N = order.size(0);
  for (int64_t n = 0; n < N; n++)
    STD_TORCH_CHECK(places[n] >= 0 && places[n] < N, kOp, ": order has ", places[n], ", wanted places of ", N,
                    " outputs");
}

// Threads share out the columns, each of so many products.
template <typename Run> void share_out(int64_t columns, int64_t products, const Run& run) {
  torch::stable::parallel_for(0, columns, std::max<int64_t>(1, kFewestProducts / std::max<int64_t>(1, products)), run);
}

Tensor low_rank_rows(const Tensor& x, const Tensor& down, const Tensor& up, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& residual, const std::optional<Tensor>& order,
                     const std::optional<Tensor>& pivot_bias) {
  STD_TORCH_CHECK(x.dim() >= 1, kOp, ": x is 0-dimensional, wanted (..., K)");
  const int64_t K = x.size(x.dim() - 1);
  STD_TORCH_CHECK(down.dim() == 2 && down.size(1) == K, kOp, ": down is ", shape(down), ", wanted (R, ", K, ")");
  const int64_t R = down.size(0);
  STD_TORCH_CHECK(up.dim() == 2 && up.size(1) == R, kOp, ": up is ", shape(up), ", wanted (N, ", R, ")");
  const Dtype dtype = dtype_of(kOp, x);
  STD_TORCH_CHECK(dtype == Dtype::float32 || dtype == Dtype::bfloat16, kOp, ": x is ", name_of(dtype),
                  ", wanted float32 or bfloat16");
  check_like(kOp, "down", down, x);
  check_like(kOp, "up", up, x);
  check_vector("bias", bias, x, up.size(0));
  check_vector("pivot_bias", pivot_bias, x, R);
  std::optional<Tensor> places;
  if (order) {
    places.emplace(as_contiguous(*order));
    check_order(*places, x);
    STD_TORCH_CHECK(order->size(0) == up.size(0) + R, kOp, ": order is ", shape(*order), ", wanted (", up.size(0) + R,
                    ") of up ", shape(up));
  }
  STD_TORCH_CHECK(order || !pivot_bias, kOp, ": pivot_bias is given without an order");
  const int64_t N = order ? order->size(0) : up.size(0);
  if (residual) check_residual(kOp, *residual, x, N);
  const int64_t M = rows_of(x);

  const auto plain = [](const std::optional<Tensor>& each) {
    return each ? std::optional<Tensor>(as_contiguous(*each)) : std::nullopt;
  };
  const Tensor rows = as_contiguous(x), first = as_contiguous(down), second = as_contiguous(up);
  const std::optional<Tensor> ends[] = {plain(bias), plain(pivot_bias), plain(residual)};
  const Tensor y = rows_like(x, N);
  const bool narrow = dtype == Dtype::bfloat16;
  const std::unique_ptr<float[]> between(new float[M * (R + narrow * K)]);
  float* const h = between.get();
  const auto* wide = static_cast<const float*>(rows.const_data_ptr());
  if (narrow) {
    widen_bfloat16(rows.const_data_ptr(), h + M * R, M * K);
    wide = h + M * R;
  }
  const FewRows layer{wide,
                      first.const_data_ptr(),
                      second.const_data_ptr(),
                      data_of(ends[0]),
                      data_of(ends[1]),
                      places ? static_cast<const int32_t*>(places->const_data_ptr()) : nullptr,
                      data_of(ends[2]),
                      h,
                      y.mutable_data_ptr(),
                      M,
                      K,
                      N,
                      R,
                      dtype};
  share_out(R, M * K, [&](int64_t begin, int64_t end) { shrink(layer, begin, end); });
  share_out(N, M * R, [&](int64_t begin, int64_t end) { expand(layer, begin, end); });
  return y;
}

}  // namespace
}  // namespace shrank::host

STABLE_TORCH_LIBRARY_FRAGMENT(shrank, library) {
  library.def(
      "low_rank_rows(Tensor x, Tensor down, Tensor up, Tensor? bias=None, Tensor? residual=None, "
      "Tensor? order=None, Tensor? pivot_bias=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(shrank, CPU, library) {
  library.impl("low_rank_rows", TORCH_BOX(&shrank::host::low_rank_rows));
}
