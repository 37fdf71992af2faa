// wgmma, the matrix instruction of a warpgroup: D (64 x N, FP32, registers) = A B + D or A B.
//
// D: thread t of the warpgroup (warp w = t / 32, lane l = t % 32) holds d[4 j + 2 h + c], the
// element of row 16 w + l / 4 + 8 h and column 8 j + 2 (l % 4) + c. A from registers (BF16): a[0],
// a[1] are columns 2 (l % 4) + {0, 1} of rows l / 4 and l / 4 + 8, a[2] and a[3] the same 8 columns
// on; FP8: columns 4 (l % 4) + {0 .. 3}, a[2] and a[3] 16 columns on.
//
// A and B in shared memory are named by descriptors. FP8: both with the contraction contiguous.
// BF16: each also transposed (kMajorMn, the other axis contiguous).
//
// Use: wgmma_fence(); wgmma...; wgmma_commit(); wgmma_wait<0>(); D (and A in registers) untouched
// in between; keep_registers(d) around it holds the compiler back.
#pragma once

#include <cstdint>

namespace lockstep::ops::cuda {

// Operand in shared memory, rows of 128 bytes with TMA's 128-byte swizzle; each eight rows are 1024
// bytes, 1024-aligned. Contraction contiguous (K-major): `stride` = bytes from one eight rows to
// the next (1024 when packed); a further 32 bytes of the contraction: address + 32.
// Transposed (BF16): rows are k, 64 columns wide; `leading` = bytes from one 64 columns to the
// next, `stride` = bytes from eight k to the next (1024 when packed); 16 further k: address + 2048.
__device__ __forceinline__ std::uint64_t operand_128b(std::uint32_t address,
                                                      std::uint32_t stride = 1024,
                                                      std::uint32_t leading = 16) {
  return (std::uint64_t{1} << 62) | (static_cast<std::uint64_t>((stride & 0x3FFFF) >> 4) << 32) |
         (static_cast<std::uint64_t>((leading & 0x3FFFF) >> 4) << 16) | ((address & 0x3FFFF) >> 4);
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
template <int kCount>
__device__ __forceinline__ void keep_registers(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void keep_registers(std::uint32_t (&a)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

enum class Fp8Type { kE4m3, kE5m2 };
enum class Major { kK, kMn };

// wgmma_fp8<A, B>(d, a, b, add): m64nNk32, N = 2 * registers of d; add = false starts from zero.
// wgmma_fp8<A, B>(d, registers of a, b, add): the same.
// wgmma_bf16<MajorA, MajorB>(d, a, b, add): m64nNk16, a a descriptor.
// wgmma_bf16<MajorB>(d, registers of a, b, add): m64nNk16.

// Register lists of the instruction, in pieces.
#define LOCKSTEP_REGS_4 "%0,%1,%2,%3"
#define LOCKSTEP_REGS_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define LOCKSTEP_REGS_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define LOCKSTEP_REGS_32 \
  LOCKSTEP_REGS_16       \
  ","                    \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LOCKSTEP_REGS_48 \
  LOCKSTEP_REGS_32       \
  ","                    \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define LOCKSTEP_REGS_64 \
  LOCKSTEP_REGS_48       \
  ","                    \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define LOCKSTEP_REGS_80 \
  LOCKSTEP_REGS_64       \
  ","                    \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define LOCKSTEP_REGS_96 \
  LOCKSTEP_REGS_80       \
  ","                    \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define LOCKSTEP_REGS_112 \
  LOCKSTEP_REGS_96        \
  ","                     \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define LOCKSTEP_REGS_128 \
  LOCKSTEP_REGS_112       \
  ","                     \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define LOCKSTEP_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LOCKSTEP_D8(i) LOCKSTEP_D4(i), LOCKSTEP_D4(i + 4)
#define LOCKSTEP_D16(i) LOCKSTEP_D8(i), LOCKSTEP_D8(i + 8)
#define LOCKSTEP_DS_4 LOCKSTEP_D4(0)
#define LOCKSTEP_DS_8 LOCKSTEP_D8(0)
#define LOCKSTEP_DS_16 LOCKSTEP_D16(0)
#define LOCKSTEP_DS_32 LOCKSTEP_DS_16, LOCKSTEP_D16(16)
#define LOCKSTEP_DS_48 LOCKSTEP_DS_32, LOCKSTEP_D16(32)
#define LOCKSTEP_DS_64 LOCKSTEP_DS_48, LOCKSTEP_D16(48)
#define LOCKSTEP_DS_80 LOCKSTEP_DS_64, LOCKSTEP_D16(64)
#define LOCKSTEP_DS_96 LOCKSTEP_DS_80, LOCKSTEP_D16(80)
#define LOCKSTEP_DS_112 LOCKSTEP_DS_96, LOCKSTEP_D16(96)
#define LOCKSTEP_DS_128 LOCKSTEP_DS_112, LOCKSTEP_D16(112)

#define LOCKSTEP_WGMMA_FP8(N, R, I0, I1, I2, TYPES)                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I2                      \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k32.f32." TYPES \
               " {" LOCKSTEP_REGS_##R "}, %" #I0 ", %" #I1 ", p, 1, 1;\n}\n" \
               : LOCKSTEP_DS_##R                                             \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)))

#define LOCKSTEP_WGMMA_FP8_RS(N, R, I0, I1, I2, I3, I4, I5, TYPES)                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I5                                    \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k32.f32." TYPES               \
               " {" LOCKSTEP_REGS_##R "}, {%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 \
                                      ", p, 1, 1;\n}\n"                                    \
               : LOCKSTEP_DS_##R                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))

#define LOCKSTEP_WGMMA_BF16(N, R, I0, I1, I2, I3, I4)                                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I2                                        \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N                                    \
               "k16.f32.bf16.bf16 {" LOCKSTEP_REGS_##R "}, %" #I0 ", %" #I1 ", p, 1, 1, %" #I3 \
                                                       ", %" #I4 ";\n}\n"                      \
               : LOCKSTEP_DS_##R                                                               \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(static_cast<int>(kMajorA)),   \
                 "n"(static_cast<int>(kMajorB)))

#define LOCKSTEP_WGMMA_BF16_RS(N, R, I0, I1, I2, I3, I4, I5, I6)                                 \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I5                                          \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N                                      \
               "k16.f32.bf16.bf16 {" LOCKSTEP_REGS_##R "}, {%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 \
                                                       "}, %" #I4 ", p, 1, 1, %" #I6 ";\n}\n"    \
               : LOCKSTEP_DS_##R                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), \
                 "n"(static_cast<int>(kMajorB)))

#define LOCKSTEP_WGMMA(N, R, I0, I1, I2, I3, I4, I5, I6)                                     \
  template <Fp8Type kA, Fp8Type kB>                                                          \
  __device__ __forceinline__ void wgmma_fp8(float(&d)[R], std::uint64_t a, std::uint64_t b,  \
                                            bool add) {                                      \
    if constexpr (kA == Fp8Type::kE4m3 && kB == Fp8Type::kE4m3)                              \
      LOCKSTEP_WGMMA_FP8(N, R, I0, I1, I2, "e4m3.e4m3");                                     \
    else if constexpr (kA == Fp8Type::kE4m3)                                                 \
      LOCKSTEP_WGMMA_FP8(N, R, I0, I1, I2, "e4m3.e5m2");                                     \
    else if constexpr (kB == Fp8Type::kE4m3)                                                 \
      LOCKSTEP_WGMMA_FP8(N, R, I0, I1, I2, "e5m2.e4m3");                                     \
    else                                                                                     \
      LOCKSTEP_WGMMA_FP8(N, R, I0, I1, I2, "e5m2.e5m2");                                     \
  }                                                                                          \
  template <Fp8Type kA, Fp8Type kB>                                                          \
  __device__ __forceinline__ void wgmma_fp8(float(&d)[R], const std::uint32_t(&a)[4],        \
                                            std::uint64_t b, bool add) {                     \
    if constexpr (kA == Fp8Type::kE4m3 && kB == Fp8Type::kE4m3)                              \
      LOCKSTEP_WGMMA_FP8_RS(N, R, I0, I1, I2, I3, I4, I5, "e4m3.e4m3");                      \
    else if constexpr (kA == Fp8Type::kE4m3)                                                 \
      LOCKSTEP_WGMMA_FP8_RS(N, R, I0, I1, I2, I3, I4, I5, "e4m3.e5m2");                      \
    else if constexpr (kB == Fp8Type::kE4m3)                                                 \
      LOCKSTEP_WGMMA_FP8_RS(N, R, I0, I1, I2, I3, I4, I5, "e5m2.e4m3");                      \
    else                                                                                     \
      LOCKSTEP_WGMMA_FP8_RS(N, R, I0, I1, I2, I3, I4, I5, "e5m2.e5m2");                      \
  }                                                                                          \
  template <Major kMajorA, Major kMajorB>                                                    \
  __device__ __forceinline__ void wgmma_bf16(float(&d)[R], std::uint64_t a, std::uint64_t b, \
                                             bool add) {                                     \
    LOCKSTEP_WGMMA_BF16(N, R, I0, I1, I2, I3, I4);                                           \
  }                                                                                          \
  template <Major kMajorB>                                                                   \
  __device__ __forceinline__ void wgmma_bf16(float(&d)[R], const std::uint32_t(&a)[4],       \
                                             std::uint64_t b, bool add) {                    \
    LOCKSTEP_WGMMA_BF16_RS(N, R, I0, I1, I2, I3, I4, I5, I6);                                \
  }

LOCKSTEP_WGMMA(8, 4, 4, 5, 6, 7, 8, 9, 10)
LOCKSTEP_WGMMA(16, 8, 8, 9, 10, 11, 12, 13, 14)
LOCKSTEP_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
LOCKSTEP_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
LOCKSTEP_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
LOCKSTEP_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
LOCKSTEP_WGMMA(160, 80, 80, 81, 82, 83, 84, 85, 86)
LOCKSTEP_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
LOCKSTEP_WGMMA(224, 112, 112, 113, 114, 115, 116, 117, 118)
LOCKSTEP_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)

#undef LOCKSTEP_WGMMA
#undef LOCKSTEP_WGMMA_FP8
#undef LOCKSTEP_WGMMA_FP8_RS
#undef LOCKSTEP_WGMMA_BF16
#undef LOCKSTEP_WGMMA_BF16_RS
#undef LOCKSTEP_D4
#undef LOCKSTEP_D8
#undef LOCKSTEP_D16
#undef LOCKSTEP_REGS_4
#undef LOCKSTEP_REGS_8
#undef LOCKSTEP_REGS_16
#undef LOCKSTEP_REGS_32
#undef LOCKSTEP_REGS_48
#undef LOCKSTEP_REGS_64
#undef LOCKSTEP_REGS_80
#undef LOCKSTEP_REGS_96
#undef LOCKSTEP_REGS_112
#undef LOCKSTEP_REGS_128
#undef LOCKSTEP_DS_4
#undef LOCKSTEP_DS_8
#undef LOCKSTEP_DS_16
#undef LOCKSTEP_DS_32
#undef LOCKSTEP_DS_48
#undef LOCKSTEP_DS_64
#undef LOCKSTEP_DS_80
#undef LOCKSTEP_DS_96
#undef LOCKSTEP_DS_112
#undef LOCKSTEP_DS_128

}  // namespace lockstep::ops::cuda
