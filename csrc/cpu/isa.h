// What every instruction set's file includes first. No std:: template, and no function that is not in an anonymous
// namespace, may be compiled with special flags: the linker keeps one copy of a shared inline function for the whole
// library, and it may be the AVX-512 one.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#define NOINLINE __attribute__((noinline))
#else
#define NOINLINE
#endif

// Of a lambda that a loop and its remainder both call: left to itself, the compiler may make a function of it, and then
// what it captures, sums above all, goes through memory.
#if defined(__GNUC__)
#define INLINED __attribute__((always_inline))
#else
#define INLINED
#endif

// Of a kernel: everything it calls is inlined, and what that calls. Functions of a Vec pass it through memory, and work
// out what only some of their callers use. Not in a build that is there to be compared with.
#if defined(__GNUC__) && !defined(FASTLLM_SPARE)
#define FLATTENED __attribute__((flatten))
#else
#define FLATTENED
#endif

// Asks for a cache line ahead of its use; harmless past the end of memory.
#if defined(__GNUC__)
#define PREFETCH(address) __builtin_prefetch(address)
#define PREFETCH_L2(address) __builtin_prefetch(address, 0, 2)
#else
#define PREFETCH(address)
#define PREFETCH_L2(address)
#endif

// Orders what was stored past the caches (Vec::stream) before whatever tells others of it.
#if defined(__SSE2__)
#include <emmintrin.h>
#define STREAM_FENCE() _mm_sfence()
#else
#define STREAM_FENCE()
#endif

// Loops over registers: unrolled early, so that an array of sums never goes through memory.
#if defined(__clang__)
#define UNROLLED _Pragma("unroll")
#elif defined(__GNUC__)
#define UNROLLED _Pragma("GCC unroll 16")
#else
#define UNROLLED
#endif

#include "cpu/table.h"
