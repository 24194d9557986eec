// Numbers as the kernels hold them: storage types, conversions and packed access. No other file converts a half type.
// On a device these are instructions, on a host the emulator's versions of them.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SHRANK_DEVICE __device__ __forceinline__
#else
#include "../emulator/half.h"
#define SHRANK_DEVICE inline
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

// Neighbours in memory that travel in one access; 16 bytes of them become one LDG.128 or STG.128.
template <typename T, int Count> struct alignas(sizeof(T) * Count) Pack { T item[Count]; };

template <typename T, int Count> SHRANK_DEVICE Pack<T, Count> load(const T* address) {
  return *reinterpret_cast<const Pack<T, Count>*>(address);
}

template <typename T, int Count> SHRANK_DEVICE void store(T* address, const Pack<T, Count>& pack) {
  *reinterpret_cast<Pack<T, Count>*>(address) = pack;
}

}  // namespace shrank::arch
