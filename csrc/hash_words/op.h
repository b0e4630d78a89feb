// hash_words_: the checks and the mixing that the kernels of all devices share. The contract is the docstring of
// r1mega/ops/hash_words.py.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#ifdef __CUDACC__
#define R1MEGA_BOTH __host__ __device__ __forceinline__
#else
#define R1MEGA_BOTH inline
#endif

namespace r1mega {

constexpr int64_t kTile = 8192;  // words with one pair of sums

inline void check_hash_words(const at::Tensor& sums, const at::Tensor& words, int64_t first) {
  TORCH_CHECK_VALUE(words.dim() == 1 && words.scalar_type() == at::kInt, "hash_words_: expected words [N] of int32, got ",
                    words.scalar_type(), " of ", words.dim(), " dimensions");
  TORCH_CHECK_VALUE(sums.dim() == 2 && sums.size(0) == 2 && sums.scalar_type() == at::kInt && sums.is_contiguous(),
                    "hash_words_: expected contiguous sums [2, tiles] of int32, got ", sums.scalar_type(), " of ", sums.sizes());
  TORCH_CHECK_VALUE(sums.device() == words.device(), "hash_words_: expected sums on ", words.device(), ", got ", sums.device());
  TORCH_CHECK_VALUE(first >= 0 && first + words.size(0) <= sums.size(1) * kTile, "hash_words_: expected words within the ",
                    sums.size(1), " tiles of sums, got ", words.size(0), " from word ", first, " on");
}

R1MEGA_BOTH uint32_t mix_word(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  return x ^ (x >> 16);
}

R1MEGA_BOTH uint32_t first_hash(uint32_t word, uint32_t index) {
  return mix_word(word ^ (index * 0x27D4EB2Du + 0x243F6A88u) ^ ((index << 15) | (index >> 17)));
}

R1MEGA_BOTH uint32_t second_hash(uint32_t word, uint32_t index) {
  return mix_word(word ^ (index * 0x165667B1u + 0x02C74EE7u) ^ ((index << 13) | (index >> 19)));
}

}  // namespace r1mega
