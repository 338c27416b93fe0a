// Fibers: a stack each, and a switch between the scheduler and one of them. Known to AddressSanitizer.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace cuda_emulation {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 512 << 10;
#else
constexpr size_t kStackBytes = 128 << 10;
#endif

#ifdef __x86_64__
// Saves what a call must keep, leaves the stack pointer in *from and goes on where `to` was left.
__attribute__((naked, noinline)) inline void switch_stack(void**, void*) {
  asm volatile(
      "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
#endif

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (stack_ != nullptr) {
      munmap(stack_, kStackBytes);
    }
  }

  // Makes the next resume() begin `entry`, which must end in leave_for_good().
  void prepare(void (*entry)()) {
    if (stack_ == nullptr) {
      void* stack =
          mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) {
        throw std::bad_alloc();
      }
      // What runs over the end of its stack dies at once instead of writing into another's.
      mprotect(stack, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
      stack_ = static_cast<char*>(stack);
    }
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack_, kStackBytes);
    fake_stack_ = nullptr;
#endif
#ifdef __x86_64__
    // One word below the end: a function finds its stack 8 bytes off a multiple of 16.
    void** top = reinterpret_cast<void**>(stack_ + kStackBytes) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    stack_pointer_ = top - 6;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // From the scheduler into the fiber, until it leaves.
  void resume() {
#ifdef __SANITIZE_ADDRESS__
    void* scheduler_fake = nullptr;
    __sanitizer_start_switch_fiber(&scheduler_fake, stack_, kStackBytes);
#endif
#ifdef __x86_64__
    switch_stack(&scheduler_pointer_, stack_pointer_);
#else
    swapcontext(&scheduler_, &context_);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
  }

  // First thing in `entry`.
  void entered() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom_, &scheduler_bytes_);
#endif
  }

  // From the fiber back to the scheduler.
  void leave(bool for_good = false) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, scheduler_bottom_, scheduler_bytes_);
#else
    (void)for_good;
#endif
#ifdef __x86_64__
    switch_stack(&stack_pointer_, scheduler_pointer_);
#else
    swapcontext(&context_, &scheduler_);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_bottom_, &scheduler_bytes_);
#endif
  }

 private:
  char* stack_ = nullptr;
#ifdef __x86_64__
  void *stack_pointer_ = nullptr, *scheduler_pointer_ = nullptr;
#else
  ucontext_t context_, scheduler_;
#endif
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack_ = nullptr;
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_bytes_ = 0;
#endif
};

}  // namespace cuda_emulation
