// Switching between the threads of a block on their own stacks.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "machine.h"

extern "C" void shrank_emulator_switch(void** from, void* to);

#if defined(__x86_64__)
asm(R"(.text
.globl shrank_emulator_switch
.hidden shrank_emulator_switch
.type shrank_emulator_switch,@function
shrank_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size shrank_emulator_switch, .-shrank_emulator_switch)");
#elif defined(__aarch64__)
asm(R"(.text
.globl shrank_emulator_switch
.hidden shrank_emulator_switch
.type shrank_emulator_switch,%function
shrank_emulator_switch:
  stp x19, x20, [sp, #-160]!
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x19, x20, [sp], #160
  ret
)");
#else
#error "the emulator has no context switch for this processor"
#endif

namespace shrank::emulator {
namespace {

constexpr std::size_t kStackBytes = 256 << 10, kGuardBytes = 4096;  // -O0 keeps register arrays on the stack

unsigned char* stacks() {
  static unsigned char* const memory = [] {
    void* const mapped = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) std::abort();
    auto* const first = static_cast<unsigned char*>(mapped);
    for (int i = 0; i < kMaxThreads; ++i) mprotect(first + kStackBytes * i, kGuardBytes, PROT_NONE);
    return first;
  }();
  return memory;
}

void (*thread_body)();

void trampoline() {
  thread_body();
  world.running->done = true;
  --world.alive;
  leave();
}

// A stack on which the switch "returns" into the trampoline, aligned as if that had been called.
void* initial_stack(unsigned char* high) {
#if defined(__x86_64__)
  constexpr int kSaved = 6;
  void** top = reinterpret_cast<void**>(high - 64) - 1;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(&trampoline);
  top -= kSaved;
  std::memset(top, 0, kSaved * sizeof *top);
  return top;
#else
  constexpr int kSaved = 20, kLinkRegister = 11;
  void** top = reinterpret_cast<void**>(high - 64) - kSaved;
  std::memset(top, 0, kSaved * sizeof *top);
  top[kLinkRegister] = reinterpret_cast<void*>(&trampoline);
  return top;
#endif
}

void to_main() { shrank_emulator_switch(&world.running->stack_pointer, world.main_stack_pointer); }

}  // namespace

void prepare_fibers(int threads, void (*body)()) {
  thread_body = body;
  for (int i = 0; i < threads; ++i) {
    Thread& thread = world.threads[i];
    thread.stack_low = stacks() + kStackBytes * i + kGuardBytes;
    thread.stack_high = stacks() + kStackBytes * (i + 1);
    thread.stack_pointer = initial_stack(thread.stack_high);
  }
}

void switch_to(Thread& thread) {
  world.running = &thread;
  shrank_emulator_switch(&world.main_stack_pointer, thread.stack_pointer);
  world.running = nullptr;
}

void leave() {
  to_main();
  std::abort();  // nobody resumes a thread that has left
}

void wake(int thread) { world.ready[thread / kWarp] |= 1u << thread % kWarp; }

void block_here(Site site, const char* doing) {
  world.running->site = site;
  world.running->doing = doing;
  to_main();
}

void yield_here(Site site, const char* doing) {
  wake(world.running->number);
  block_here(site, doing);
}

}  // namespace shrank::emulator
