#include "few_rows.h"

#include <cstring>

#include "../arch/scalar.cuh"

namespace shrank::host {
namespace {

using arch::bfloat16;

// Two registers of SSE or NEON, or one of AVX, as the compiler's flags say.
constexpr int kLanes = 8;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

inline void load(const float* from, Floats& to) { std::memcpy(&to, from, sizeof to); }

inline void load(const bfloat16* from, Floats& to) {
  Halves bits;
  std::memcpy(&bits, from, sizeof bits);
  to = reinterpret_cast<Floats>(__builtin_convertvector(bits, Words) << 16);
}

inline float total(const Floats& numbers) {
  float sum = 0;
  for (int lane = 0; lane < kLanes; lane++) sum += numbers[lane];
  return sum;
}

// Of weights and of x: four rows of the former share the loads of x, two of the latter those of weights, and their eight
// sums hide the latency of the products.
constexpr int kRows = 4, kTokens = 2;

// The products of `rows` with each of `tokens` rows of x, which lie K apart.
template <int rows, int tokens, typename T>
inline void multiply(const T* const (&weights)[kRows], const float* x, int64_t K, float (&products)[kTokens][kRows]) {
  Floats sums[rows][tokens] = {};
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) {
    Floats of_x[tokens];
    for (int token = 0; token < tokens; token++) load(x + token * K + k, of_x[token]);
    for (int row = 0; row < rows; row++) {
      Floats weight;
      load(weights[row] + k, weight);
      for (int token = 0; token < tokens; token++) sums[row][token] += weight * of_x[token];
    }
  }
  for (int row = 0; row < rows; row++)
    for (int token = 0; token < tokens; token++) products[token][row] = total(sums[row][token]);
  for (; k < K; k++)
    for (int row = 0; row < rows; row++)
      for (int token = 0; token < tokens; token++)
        products[token][row] += arch::widen(weights[row][k]) * x[token * K + k];
}

// Collects rows of a weight until they fill a block, and gives the products of each with all rows of x to
// `take(m, column, product)`.
template <typename T, typename Take> class Products {
 public:
  Products(const float* x, int64_t M, int64_t K, const Take& take) : x_(x), M_(M), K_(K), take_(take) {}

  void add(const T* weights, int64_t column) {
    weights_[held_] = weights;
    columns_[held_++] = column;
    if (held_ == kRows) run<kRows>();
  }

  void finish() {
    const int held = held_;
    for (int row = 0; row < held; row++) {
      weights_[0] = weights_[row];
      columns_[0] = columns_[row];
      run<1>();
    }
  }

 private:
  template <int rows> void run() {
    int64_t m = 0;
    for (; m + kTokens <= M_; m += kTokens) run<rows, kTokens>(m);
    if (m < M_) run<rows, 1>(m);
    held_ = 0;
  }

  template <int rows, int tokens> void run(int64_t m) {
    float products[kTokens][kRows];
    multiply<rows, tokens>(weights_, x_ + m * K_, K_, products);
    for (int token = 0; token < tokens; token++)
      for (int row = 0; row < rows; row++) take_(m + token, columns_[row], products[token][row]);
  }

  const float* x_;
  int64_t M_, K_;
  const Take& take_;
  const T* weights_[kRows];
  int64_t columns_[kRows];
  int held_ = 0;
};

template <typename T> float number(const void* of, int64_t i) {
  return of ? arch::widen(static_cast<const T*>(of)[i]) : 0;
}

template <typename T> void shrink_as(const FewRows& layer, int64_t first, int64_t last) {
  const auto take = [&](int64_t m, int64_t r, float sum) {
    layer.h[m * layer.R + r] = arch::widen(arch::round_to<T>(sum));
  };
  Products<T, decltype(take)> products(layer.x, layer.M, layer.K, take);
  for (int64_t r = first; r < last; r++) products.add(static_cast<const T*>(layer.down) + r * layer.K, r);
  products.finish();
}

template <typename T> void expand_as(const FewRows& layer, int64_t first, int64_t last) {
  const int64_t pivots = layer.order ? layer.R : 0;
  const auto place = [&](int64_t n) { return layer.order ? layer.order[n] : n; };
  const auto end = [&](int64_t m, int64_t n, float z) {
    const int64_t i = m * layer.N + n;
    static_cast<T*>(layer.y)[i] = arch::round_to<T>(z + number<T>(layer.residual, i));
  };
  const auto take = [&](int64_t m, int64_t n, float sum) { end(m, n, sum + number<T>(layer.bias, place(n) - pivots)); };
  Products<T, decltype(take)> products(layer.h, layer.M, layer.R, take);
  for (int64_t n = first; n < last; n++) {
    const int64_t row = place(n) - pivots;
    if (row >= 0) {
      products.add(static_cast<const T*>(layer.up) + row * layer.R, n);
      continue;
    }
    for (int64_t m = 0; m < layer.M; m++)
      end(m, n, layer.h[m * layer.R + place(n)] + number<T>(layer.pivot_bias, place(n)));
  }
  products.finish();
}

}  // namespace

void shrink(const FewRows& layer, int64_t first, int64_t last) {
  layer.dtype == Dtype::float32 ? shrink_as<float>(layer, first, last) : shrink_as<bfloat16>(layer, first, last);
}

void expand(const FewRows& layer, int64_t first, int64_t last) {
  layer.dtype == Dtype::float32 ? expand_as<float>(layer, first, last) : expand_as<bfloat16>(layer, first, last);
}

void widen_bfloat16(const void* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = arch::widen(static_cast<const bfloat16*>(from)[i]);
}

}  // namespace shrank::host
