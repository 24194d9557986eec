// Element types and activations, and their names.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace shrank {

enum class Dtype { float32, float16, bfloat16, float64 };
enum class Activation { none, relu, gelu, gelu_tanh, silu };

// In the order of the enums.
inline constexpr std::array<std::string_view, 4> kDtypeNames{"float32", "float16", "bfloat16", "float64"};
inline constexpr std::array<std::string_view, 5> kActivationNames{"none", "relu", "gelu", "gelu_tanh", "silu"};

constexpr std::string_view name_of(Dtype dtype) { return kDtypeNames[static_cast<std::size_t>(dtype)]; }
constexpr std::string_view name_of(Activation activation) {
  return kActivationNames[static_cast<std::size_t>(activation)];
}

constexpr int bytes(Dtype dtype) {
  switch (dtype) {
    case Dtype::float16:
    case Dtype::bfloat16: return 2;
    case Dtype::float32: return 4;
    case Dtype::float64: return 8;
  }
  return 0;
}

// The shortest names come from the command line, the longest from torch.
inline constexpr std::array<std::pair<std::string_view, Dtype>, 10> kDtypeSpellings{{
    {"bf16", Dtype::bfloat16},
    {"bfloat16", Dtype::bfloat16},
    {"fp16", Dtype::float16},
    {"float16", Dtype::float16},
    {"half", Dtype::float16},
    {"fp32", Dtype::float32},
    {"float32", Dtype::float32},
    {"float", Dtype::float32},
    {"fp64", Dtype::float64},
    {"float64", Dtype::float64},
}};

// "dtype is 'int8', wanted one of bf16, ..."
template <typename Names>
std::string unknown_name(const char* what, std::string_view found, const Names& wanted) {
  std::string message = std::string(what) + " is '" + std::string(found) + "', wanted one of ";
  const char* separator = "";
  for (std::string_view name : wanted) {
    message.append(separator).append(name);
    separator = ", ";
  }
  return message;
}

inline Activation parse_activation(std::string_view text) {
  for (std::size_t i = 0; i < kActivationNames.size(); ++i)
    if (kActivationNames[i] == text) return static_cast<Activation>(i);
  throw std::invalid_argument(unknown_name("activation", text, kActivationNames));
}

inline Dtype parse_dtype(std::string_view text) {
  std::array<std::string_view, kDtypeSpellings.size()> wanted;
  for (std::size_t i = 0; i < kDtypeSpellings.size(); ++i) {
    const auto& [spelling, dtype] = kDtypeSpellings[i];
    if (spelling == text) return dtype;
    wanted[i] = spelling;
  }
  throw std::invalid_argument(unknown_name("dtype", text, wanted));
}

}  // namespace shrank
