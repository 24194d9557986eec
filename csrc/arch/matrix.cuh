// The tensor cores, by warp: every lane of a warp must take part. Fragment layouts: PTX ISA, "mma.m16n8k16".
#pragma once

#include "shared.cuh"

namespace shrank::arch {

// Four 8x8 matrices of 16-bit numbers. Lane l passes the address of row l % 8 of matrix l / 8; it gets, of each matrix,
// row l / 4, columns 2 (l % 4) and the next.
SHRANK_DEVICE void load_matrices(uint32_t (&fragment)[4], SharedAddress row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3]) : "r"(row) : "memory");
#else
  emulator::load_matrices(fragment, row, false);
#endif
}

// The same, each matrix transposed.
SHRANK_DEVICE void load_matrices_transposed(uint32_t (&fragment)[4], SharedAddress row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3]) : "r"(row) : "memory");
#else
  emulator::load_matrices(fragment, row, true);
#endif
}

// sum (16, 8) += a (16, 16) b (16, 8), in fp32. With g = lane / 4 and t = lane % 4:
//   sum[0..1]  row g,      columns 2t, 2t + 1      sum[2..3]  row g + 8
//   a[0], a[1] rows g, g + 8, columns 2t, 2t + 1   a[2], a[3] the same rows, columns 2t + 8, 2t + 9
//   b0, b1     column g, rows 2t, 2t + 1 and 2t + 8, 2t + 9
template <typename T>
SHRANK_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#ifdef __CUDACC__
#define SHRANK_MULTIPLY_ADD(type, name)                                                                                \
  template <>                                                                                                          \
  SHRANK_DEVICE void multiply_add<type>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {           \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                                \
                 ".f32 "                                                                                               \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                     \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                      \
  }
#else
#define SHRANK_MULTIPLY_ADD(type, name)                                                                                \
  template <>                                                                                                          \
  SHRANK_DEVICE void multiply_add<type>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {           \
    emulator::multiply_add(sum, a, b0, b1, emulator::Half::type);                                                      \
  }
#endif
SHRANK_MULTIPLY_ADD(bfloat16, "bf16")
SHRANK_MULTIPLY_ADD(float16, "f16")
#undef SHRANK_MULTIPLY_ADD

}  // namespace shrank::arch
