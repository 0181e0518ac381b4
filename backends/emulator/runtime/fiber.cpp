#include "fiber.h"

#include <cstdint>
#include <cstring>
#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>

#include <new>
#endif

namespace emulator {

#if defined(__x86_64__)

// The registers that a called function must keep, then the address to go on at.
asm(R"(
.text
.globl emulator_switch_fiber
.type emulator_switch_fiber, @function
emulator_switch_fiber:
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
.size emulator_switch_fiber, . - emulator_switch_fiber
)");

void* prepare_fiber(char* stack, size_t bytes, void (*entry)()) {
    auto** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // where `entry` would return to: ends a debugger's backtrace, and aligns the stack
    *--top = reinterpret_cast<void*>(entry);
    top -= 6;
    std::memset(top, 0, 6 * sizeof(void*));
    return top;
}

#elif defined(__aarch64__)

asm(R"(
.text
.globl emulator_switch_fiber
.type emulator_switch_fiber, %function
emulator_switch_fiber:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
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
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emulator_switch_fiber, . - emulator_switch_fiber
)");

void* prepare_fiber(char* stack, size_t bytes, void (*entry)()) {
    auto** top = reinterpret_cast<void**>(stack + bytes - 160);
    std::memset(top, 0, 160);
    top[11] = reinterpret_cast<void*>(entry);  // x30, the link register
    return top;
}

#else

void* prepare_fiber(char* stack, size_t bytes, void (*entry)()) {
    auto* context = new (stack) ucontext_t;
    getcontext(context);
    const size_t taken = (sizeof(ucontext_t) + 63) / 64 * 64;
    context->uc_stack.ss_sp = stack + taken;
    context->uc_stack.ss_size = bytes - taken;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}

#endif

}  // namespace emulator

#if !defined(__x86_64__) && !defined(__aarch64__)
extern "C" void emulator_switch_fiber(void** left, void* entered) {
    ucontext_t here;
    *left = &here;
    swapcontext(&here, static_cast<ucontext_t*>(entered));
}
#endif
