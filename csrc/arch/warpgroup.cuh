// The tensor cores of sm_90a, by warpgroup: all lanes of four neighbouring warps take part. PTX ISA, "wgmma".
#pragma once

#include <type_traits>

#include "hopper.cuh"

namespace shrank::arch {

// An operand in shared memory: rows of 64 numbers, groups of 8 rows 1024 bytes apart, 128-byte swizzle. Its first row
// is at a multiple of 1024 bytes; 16 columns further are 32 bytes on. PTX ISA, "Matrix descriptor".
SHRANK_DEVICE uint64_t operand_at(SharedAddress address) {
  constexpr uint64_t kLeadingOffset = 1, kGroupOffset = 1024 / 16, kSwizzle128 = 1;  // the first is not used here
  const uint64_t start = (address & 0x3ffff) / 16;
  return start | kLeadingOffset << 16 | kGroupOffset << 32 | kSwizzle128 << 62;
}

// Before the first product, and before a product into sums that the threads have changed. The empty instructions here
// and in warpgroup_wait keep the compiler from moving an access to the sums across.
template <int COUNT> SHRANK_DEVICE void warpgroup_fence([[maybe_unused]] float (&sum)[COUNT]) {
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(sum[i])::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  emulator::warpgroup_fence();
#endif
}

// Closes this warp's group of products.
SHRANK_DEVICE void warpgroup_commit() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  emulator::warpgroup_commit();
#endif
}

// Until all but the newest `PENDING` groups are done: their sums can be read, and their operands overwritten.
template <int PENDING, int COUNT> SHRANK_DEVICE void warpgroup_wait([[maybe_unused]] float (&sum)[COUNT]) {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(sum[i])::"memory");
#else
  emulator::warpgroup_wait(PENDING);
#endif
}

// sum (64, N) += a (64, 16) b (N, 16)^T, in fp32, in the background. Warp w of the four has rows 16 w to 16 w + 15. Of
// these, with g = lane / 4 and t = lane % 4:
//   sum[4 j], [4 j + 1]  row g, columns 8 j + 2 t and the next      sum[4 j + 2], [4 j + 3]  row g + 8
template <typename T, int N>
SHRANK_DEVICE void warpgroup_multiply_add(float (&sum)[N / 2], uint64_t a, uint64_t b);

#ifdef __CUDACC__
#define SHRANK_SUMS_8(i)                                                                                               \
  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]),              \
      "+f"(sum[i + 6]), "+f"(sum[i + 7])
#define SHRANK_SUMS_32(i) SHRANK_SUMS_8(i), SHRANK_SUMS_8(i + 8), SHRANK_SUMS_8(i + 16), SHRANK_SUMS_8(i + 24)
#define SHRANK_SUMS_64 SHRANK_SUMS_32(0), SHRANK_SUMS_32(32)
#define SHRANK_NAMES_32                                                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                             \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SHRANK_NAMES_64                                                                                                \
  SHRANK_NAMES_32                                                                                                      \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                                 \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// The last operands: add to the sums, do not negate a or b, both operands have their 16 columns side by side.
#define SHRANK_WARPGROUP_MULTIPLY_ADD(type, name, n, names, a_name, b_name, ...)                                       \
  template <>                                                                                                          \
  SHRANK_DEVICE void warpgroup_multiply_add<type, n>(float (&sum)[n / 2], uint64_t a, uint64_t b) {                    \
    asm volatile(                                                                                                      \
        "{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                                                                 \
        "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" names "}, " a_name ", " b_name            \
        ", add, 1, 1, 0, 0;\n}" : __VA_ARGS__ : "l"(a), "l"(b));                                                       \
  }
SHRANK_WARPGROUP_MULTIPLY_ADD(bfloat16, "bf16", 64, SHRANK_NAMES_32, "%32", "%33", SHRANK_SUMS_32(0))
SHRANK_WARPGROUP_MULTIPLY_ADD(float16, "f16", 64, SHRANK_NAMES_32, "%32", "%33", SHRANK_SUMS_32(0))
SHRANK_WARPGROUP_MULTIPLY_ADD(bfloat16, "bf16", 128, SHRANK_NAMES_64, "%64", "%65", SHRANK_SUMS_64)
SHRANK_WARPGROUP_MULTIPLY_ADD(float16, "f16", 128, SHRANK_NAMES_64, "%64", "%65", SHRANK_SUMS_64)
#undef SHRANK_WARPGROUP_MULTIPLY_ADD
#undef SHRANK_NAMES_64
#undef SHRANK_NAMES_32
#undef SHRANK_SUMS_64
#undef SHRANK_SUMS_32
#undef SHRANK_SUMS_8
#else
template <typename T, int N>
SHRANK_DEVICE void warpgroup_multiply_add(float (&sum)[N / 2], uint64_t a, uint64_t b) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>);
  emulator::warpgroup_multiply_add(sum, N, a, b,
                                   std::is_same_v<T, float16> ? emulator::Half::float16 : emulator::Half::bfloat16);
}
#endif

}  // namespace shrank::arch
