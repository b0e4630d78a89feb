// What the fp32 kernels of a CPU share: an exponential that compilers vectorise, and rows in and out of bf16 and fp16.
//
// Functions marked R1MEGA_WIDE are compiled for AVX2 and AVX-512 too, and chosen when the library is loaded. Without fused
// multiply-adds all of them give the same bits: results do not depend on the processor (golden losses hold on any of x86-64).

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <bit>
#include <cmath>
#include <cstdint>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define R1MEGA_WIDE __attribute__((target_clones("avx512f", "avx2", "default"), optimize("fp-contract=off")))
#else
#define R1MEGA_WIDE
#endif

namespace r1mega {

// e^x within two units in the last place, infinity where fp32 ends. NaN gives a number: callers multiply by x.
// e^x = 2^n e^r with n the integer nearest to x / ln 2 and |r| at most ln 2 / 2, where seven terms of the series are enough.
inline float exp_of(float x) {
  constexpr float kToInteger = 0x1.8p23f;  // added, it leaves the nearest integer in a number's last bits
  // |x| at most 89, by one minimum of its bits as an integer: compilers make branches of two, and of floats, and vectorise neither
  const uint32_t bits = std::bit_cast<uint32_t>(x), size = bits & 0x7fffffffu, most = std::bit_cast<uint32_t>(89.0f);
  const float held = std::bit_cast<float>((size < most ? size : most) | (bits & 0x80000000u));
  const float shifted = held * 1.44269504f + kToInteger;
  const float n = shifted - kToInteger;
  const float r = (held - n * 0x1.63p-1f) - n * -0x1.bd0106p-13f;  // ln 2 in two parts: n times the first is exact
  float sum = 1.0f / 5040;
  sum = sum * r + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = (sum * r) * r + r + 1.0f;
  // 2^n in two factors: n goes from -128 to 128
  const int32_t power = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kToInteger), part = power >> 1;
  return sum * std::bit_cast<float>((part + 127) << 23) * std::bit_cast<float>((power - part + 127) << 23);
}

inline double exp_of(double x) { return std::exp(x); }

// A row in the type that is computed in: itself, or a copy in `buffer`.
inline const float* widened(const float* row, float*, int64_t) { return row; }
inline const double* widened(const double* row, double*, int64_t) { return row; }
R1MEGA_WIDE const float* widened(const c10::BFloat16* row, float* buffer, int64_t count);
const float* widened(const c10::Half* row, float* buffer, int64_t count);

// Where a row's results are computed, and their way into the row: rounded to the nearest, ties to even.
inline float* place_for(float* row, float*) { return row; }
inline double* place_for(double* row, double*) { return row; }
template <typename T>
float* place_for(T*, float* buffer) {
  return buffer;
}
inline void narrow(const float*, float*, int64_t) {}
inline void narrow(const double*, double*, int64_t) {}
R1MEGA_WIDE void narrow(const float* results, c10::BFloat16* row, int64_t count);
void narrow(const float* results, c10::Half* row, int64_t count);

}  // namespace r1mega
