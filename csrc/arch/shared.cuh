// Shared memory, by its 32-bit addresses. Accesses wider than 4 bytes must be aligned to their width.
#pragma once

#include "scalar.cuh"

namespace shrank::arch {

using SharedAddress = uint32_t;

// The block's dynamic shared memory, aligned to 1024 bytes.
SHRANK_DEVICE SharedAddress dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(1024) unsigned char memory[];
  return static_cast<SharedAddress>(__cvta_generic_to_shared(memory));
#else
  return emulator::dynamic_shared();
#endif
}

// OFFSET is part of the instruction: places that are constants apart share a register.
template <int OFFSET = 0> SHRANK_DEVICE void store_shared(SharedAddress address, uint32_t value) {
#ifdef __CUDACC__
  asm volatile("st.shared.b32 [%0+%2], %1;" ::"r"(address), "r"(value), "n"(OFFSET) : "memory");
#else
  emulator::store_shared(address + OFFSET, &value, sizeof value);
#endif
}

SHRANK_DEVICE void store_shared(SharedAddress address, const Pack<float, 2>& value) {
#ifdef __CUDACC__
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(value.item[0]), "f"(value.item[1]) : "memory");
#else
  emulator::store_shared(address, &value, sizeof value);
#endif
}

SHRANK_DEVICE void store_shared(SharedAddress address, const Pack<float, 4>& value) {
#ifdef __CUDACC__
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(value.item[0]), "f"(value.item[1]),
               "f"(value.item[2]), "f"(value.item[3]) : "memory");
#else
  emulator::store_shared(address, &value, sizeof value);
#endif
}

SHRANK_DEVICE void store_shared(SharedAddress address, const Pack<uint32_t, 4>& value) {
#ifdef __CUDACC__
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.item[0]), "r"(value.item[1]),
               "r"(value.item[2]), "r"(value.item[3]) : "memory");
#else
  emulator::store_shared(address, &value, sizeof value);
#endif
}

SHRANK_DEVICE Pack<float, 4> load_shared_floats(SharedAddress address) {
  Pack<float, 4> value;
#ifdef __CUDACC__
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(value.item[0]), "=f"(value.item[1]),
                                                            "=f"(value.item[2]),
                                                            "=f"(value.item[3]) : "r"(address) : "memory");
#else
  emulator::load_shared(&value, address, sizeof value);
#endif
  return value;
}

template <int OFFSET = 0> SHRANK_DEVICE Pack<uint32_t, 4> load_shared_words(SharedAddress address) {
  Pack<uint32_t, 4> value;
#ifdef __CUDACC__
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4+%5];"
               : "=r"(value.item[0]), "=r"(value.item[1]), "=r"(value.item[2]), "=r"(value.item[3])
               : "r"(address), "n"(OFFSET) : "memory");
#else
  emulator::load_shared(&value, address + OFFSET, sizeof value);
#endif
  return value;
}

// 16 bytes from global to shared memory, in the background; bytes past the first `valid` (0 or 16) become zero, and
// with 0 nothing is read. Both addresses are aligned to 16 bytes.
SHRANK_DEVICE void copy_async(SharedAddress to, const void* from, int valid) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
               "r"(valid) : "memory");
#else
  emulator::copy_async(to, from, valid);
#endif
}

// The same, and nothing at all unless `go`.
SHRANK_DEVICE void copy_async_if(bool go, SharedAddress to, const void* from, int valid) {
#ifdef __CUDACC__
  asm volatile(
      "{\n.reg .pred go;\nsetp.ne.b32 go, %3, 0;\n@go cp.async.cg.shared.global [%0], [%1], 16, %2;\n}" ::"r"(to),
      "l"(__cvta_generic_to_global(from)), "r"(valid), "r"(static_cast<int>(go)) : "memory");
#else
  if (go) emulator::copy_async(to, from, valid);
#endif
}

// The same as copy_async for bytes that the SM will ask for again: they may stay in its L1.
SHRANK_DEVICE void copy_async_reused(SharedAddress to, const void* from, int valid) {
#ifdef __CUDACC__
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
               "r"(valid) : "memory");
#else
  emulator::copy_async(to, from, valid);
#endif
}

// Both: unless `go`, nothing at all.
SHRANK_DEVICE void copy_async_reused_if(bool go, SharedAddress to, const void* from, int valid) {
#ifdef __CUDACC__
  asm volatile(
      "{\n.reg .pred go;\nsetp.ne.b32 go, %3, 0;\n@go cp.async.ca.shared.global [%0], [%1], 16, %2;\n}" ::"r"(to),
      "l"(__cvta_generic_to_global(from)), "r"(valid), "r"(static_cast<int>(go)) : "memory");
#else
  if (go) emulator::copy_async(to, from, valid);
#endif
}

template <int OFFSET = 0> SHRANK_DEVICE Pack<uint32_t, 2> load_shared_pair(SharedAddress address) {
  Pack<uint32_t, 2> value;
#ifdef __CUDACC__
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2+%3];" : "=r"(value.item[0]),
                                                       "=r"(value.item[1]) : "r"(address), "n"(OFFSET) : "memory");
#else
  emulator::load_shared(&value, address + OFFSET, sizeof value);
#endif
  return value;
}

SHRANK_DEVICE void store_shared(SharedAddress address, const Pack<uint32_t, 2>& value) {
#ifdef __CUDACC__
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(value.item[0]), "r"(value.item[1]) : "memory");
#else
  emulator::store_shared(address, &value, sizeof value);
#endif
}

// Closes this thread's group of copies; a group may be empty.
SHRANK_DEVICE void copy_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::copy_async_commit();
#endif
}

// Until all but the newest `Pending` groups of this thread have landed. Other threads see them after a barrier.
template <int Pending> SHRANK_DEVICE void copy_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#else
  emulator::copy_async_wait(Pending);
#endif
}

}  // namespace shrank::arch
