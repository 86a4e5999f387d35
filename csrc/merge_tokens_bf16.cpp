// The units of this machine that multiply bf16 without widening it.

#include "common.h"
#include "merge_tokens.h"

#if defined(SPARSIFY_PAIRS)
#include <immintrin.h>
#endif
#if defined(SPARSIFY_PAIRS) && defined(__linux__) && __GNUC__ >= 11
#define SPARSIFY_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sparsify {
namespace {

#if defined(SPARSIFY_PAIRS)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512,avx512bf16")
namespace pairs {
#include "merge_tokens_bf16.inl"
}  // namespace pairs
#pragma GCC pop_options

constexpr Bf16Kernels kPairs = {pairs::has_small_values, pairs::assign};
#endif

#if defined(SPARSIFY_TILES)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512,amx-tile,amx-bf16")
namespace tiles {
#include "merge_tokens_amx.inl"
}  // namespace tiles
#pragma GCC pop_options

// Whether the machine has tiles, and Linux lets this process use them.
bool has_tiles() {
  constexpr long kAskFor = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
}

constexpr Bf16Kernels kTiles = {tiles::has_small_values, tiles::assign};
#endif

const Bf16Kernels* pick() {
  [[maybe_unused]] const Bf16Units allowed = allowed_bf16_units();
#if defined(SPARSIFY_TILES)
  if (allowed == Bf16Units::all && has_tiles()) {
    return &kTiles;
  }
#endif
#if defined(SPARSIFY_PAIRS)
  if (allowed != Bf16Units::none && has_pairs()) {
    return &kPairs;
  }
#endif
  return nullptr;
}

}  // namespace

const Bf16Kernels* bf16_kernels() {
  static const Bf16Kernels* const kernels = pick();
  return kernels;
}

}  // namespace sparsify
