// Rows between bf16 or fp16 and fp32; see wide.h.

#include "wide.h"

namespace r1mega {

R1MEGA_WIDE const float* widened(const c10::BFloat16* row, float* __restrict__ buffer, int64_t count) {
  const auto* bits = reinterpret_cast<const uint16_t*>(row);
  for (int64_t i = 0; i < count; ++i) buffer[i] = std::bit_cast<float>(static_cast<uint32_t>(bits[i]) << 16);
  return buffer;
}

const float* widened(const c10::Half* row, float* __restrict__ buffer, int64_t count) {
  for (int64_t i = 0; i < count; ++i) buffer[i] = row[i];
  return buffer;
}

R1MEGA_WIDE void narrow(const float* __restrict__ results, c10::BFloat16* row, int64_t count) {
  auto* __restrict__ out = reinterpret_cast<uint16_t*>(row);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(results[i]);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}

void narrow(const float* __restrict__ results, c10::Half* row, int64_t count) {
  for (int64_t i = 0; i < count; ++i) row[i] = results[i];
}

}  // namespace r1mega
