// Numbers as the kernels hold them: storage types, conversions and packed access. No other file converts a half type.
// On a device these are instructions, on a host the emulator's versions of them.
#pragma once

#include <cmath>
#include <cstdint>

#include "device.cuh"
#ifndef __CUDACC__
#include "../emulator/half.h"
#endif

namespace shrank::arch {

struct float16 { uint16_t bits; };
struct bfloat16 { uint16_t bits; };

// The type in which a storage type is computed.
template <typename T> struct Compute { using type = float; };
template <> struct Compute<double> { using type = double; };
template <typename T> using compute_t = typename Compute<T>::type;

SHRANK_DEVICE float widen(float value) { return value; }
SHRANK_DEVICE double widen(double value) { return value; }

SHRANK_DEVICE float widen(bfloat16 value) {
#ifdef __CUDACC__
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
#else
  return emulator::widen_bfloat16(value.bits);
#endif
}

SHRANK_DEVICE float widen(float16 value) {
#ifdef __CUDACC__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  return emulator::widen_float16(value.bits);
#endif
}

// To the storage type, rounded to nearest even; overflow becomes infinity, as in PyTorch.
template <typename T> SHRANK_DEVICE T round_to(compute_t<T> value) { return value; }

template <> SHRANK_DEVICE bfloat16 round_to<bfloat16>(float value) {
#ifdef __CUDACC__
  bfloat16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
  return rounded;
#else
  return {emulator::round_to_bfloat16(value)};
#endif
}

template <> SHRANK_DEVICE float16 round_to<float16>(float value) {
#ifdef __CUDACC__
  float16 rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
  return rounded;
#else
  return {emulator::round_to_float16(value)};
#endif
}

// Two numbers in one register, `low` in the lower half, as the tensor cores take them.
template <typename T> SHRANK_DEVICE uint32_t round_to_pair(float low, float high);

template <> SHRANK_DEVICE uint32_t round_to_pair<bfloat16>(float low, float high) {
#ifdef __CUDACC__
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return emulator::round_to_bfloat16(low) | static_cast<uint32_t>(emulator::round_to_bfloat16(high)) << 16;
#endif
}

template <> SHRANK_DEVICE uint32_t round_to_pair<float16>(float low, float high) {
#ifdef __CUDACC__
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return emulator::round_to_float16(low) | static_cast<uint32_t>(emulator::round_to_float16(high)) << 16;
#endif
}

// 2^x and 1/x, each to about 2 units in the last place of fp32 (PTX ISA, "ex2", "rcp").
SHRANK_DEVICE float exp2_approximate(float x) {
#ifdef __CUDACC__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::exp2(x);
#endif
}

SHRANK_DEVICE float reciprocal_approximate(float x) {
#ifdef __CUDACC__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}

// The larger number, +0 above -0; NaN if either is.
SHRANK_DEVICE float max_or_nan(float a, float b) {
#ifdef __CUDACC__
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  return std::isnan(a) || a > b || (a == b && !std::signbit(a)) ? a : b;
#endif
}

// In one instruction: a plain product of sizes becomes one of 64 by 64 bits once the compiler has moved their sign
// extensions out of a loop (nvcc 13.0: five instructions for each copy).
SHRANK_DEVICE int64_t multiply_wide(int a, int b) {
#ifdef __CUDACC__
  int64_t product;
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return int64_t{a} * b;
#endif
}

// `from` and a * b bytes, in one instruction: a sum that the compiler does not take apart.
SHRANK_DEVICE const char* multiply_add_wide(int a, int b, const char* from) {
#ifdef __CUDACC__
  const char* sum;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(sum) : "r"(a), "r"(b), "l"(from));
  return sum;
#else
  return from + int64_t{a} * b;
#endif
}

// Neighbours in memory that travel in one access; 16 bytes of them become one LDG.128 or STG.128.
template <typename T, int Count> struct alignas(sizeof(T) * Count) Pack { T item[Count]; };

template <typename T, int Count> SHRANK_DEVICE Pack<T, Count> load(const T* address) {
#ifdef SHRANK_EMULATED
  Pack<T, Count> pack;
  emulator::load_global(&pack, address, sizeof pack);
  return pack;
#else
  return *reinterpret_cast<const Pack<T, Count>*>(address);
#endif
}

// 4 bytes if `go`, else zeros; without a branch, so that several are on their way at once.
SHRANK_DEVICE uint32_t load_word_if(bool go, const void* address) {
  uint32_t word = 0;
#ifdef __CUDACC__
  asm volatile("{\n.reg .pred go;\nsetp.ne.b32 go, %2, 0;\nmov.b32 %0, 0;\n@go ld.global.b32 %0, [%1];\n}" : "=&r"(word)
               : "l"(__cvta_generic_to_global(address)), "r"(static_cast<int>(go)));
#else
  if (go) word = load<uint32_t, 1>(static_cast<const uint32_t*>(address)).item[0];
#endif
  return word;
}

// 16 bytes if `go`, else zeros; also without a branch.
SHRANK_DEVICE Pack<uint32_t, 4> load_words_if(bool go, const void* address) {
  Pack<uint32_t, 4> words{};
#ifdef __CUDACC__
  asm volatile(
      "{\n.reg .pred go;\nsetp.ne.b32 go, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@go ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(words.item[0]), "=&r"(words.item[1]), "=&r"(words.item[2]), "=&r"(words.item[3])
      : "l"(__cvta_generic_to_global(address)), "r"(static_cast<int>(go)));
#else
  if (go) words = load<uint32_t, 4>(static_cast<const uint32_t*>(address));
#endif
  return words;
}

// The same of bytes that nobody else asks for: they do not stay in L1, and L2 asks for the whole line. Not through the
// read-only path: ptxas moves such loads behind a wait for the grid before (nvcc 13.0).
SHRANK_DEVICE Pack<uint32_t, 4> load_once_if(bool go, const void* address) {
#ifdef __CUDACC__
  Pack<uint32_t, 4> words;
  asm volatile(
      "{\n.reg .pred go;\nsetp.ne.b32 go, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@go ld.global.L1::no_allocate.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(words.item[0]), "=&r"(words.item[1]), "=&r"(words.item[2]), "=&r"(words.item[3])
      : "l"(__cvta_generic_to_global(address)), "r"(static_cast<int>(go)));
  return words;
#else
  return load_words_if(go, address);
#endif
}

template <typename T, int Count> SHRANK_DEVICE void store(T* address, const Pack<T, Count>& pack) {
#ifdef SHRANK_EMULATED
  emulator::store_global(address, &pack, sizeof pack);
#else
  *reinterpret_cast<Pack<T, Count>*>(address) = pack;
#endif
}

// Two numbers of one register, as round_to_pair has them: the lower half first.
template <typename T> SHRANK_DEVICE Pack<float, 2> widen_pair(uint32_t pair) {
  return {{widen(T{static_cast<uint16_t>(pair)}), widen(T{static_cast<uint16_t>(pair >> 16)})}};
}

#ifdef __CUDACC__
template <> SHRANK_DEVICE Pack<float, 2> widen_pair<bfloat16>(uint32_t pair) {
  return {{__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)}};  // an instruction each
}
#endif

// If `go`, the line of 128 bytes that holds the address is on its way to L2. A hint: it reads nothing.
SHRANK_DEVICE void prefetch_if([[maybe_unused]] bool go, [[maybe_unused]] const void* address) {
#ifdef __CUDACC__
  asm volatile("{\n.reg .pred go;\nsetp.ne.b32 go, %1, 0;\n@go prefetch.global.L2 [%0];\n}" ::"l"(
                   __cvta_generic_to_global(address)),
               "r"(static_cast<int>(go)));
#endif
}

}  // namespace shrank::arch
