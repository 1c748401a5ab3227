// CHECK(condition, what, ...): std::runtime_error of what the user is to read, its pieces joined; torch's
// STD_TORCH_CHECK puts a file and a line of ours before that.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace fastllm {

template <class... Pieces>
[[noreturn]] void fail(const Pieces&... pieces) {
  std::ostringstream text;
  (text << ... << pieces);
  throw std::runtime_error(text.str());
}

}  // namespace fastllm

#define CHECK(condition, ...) ((condition) ? void() : fastllm::fail(__VA_ARGS__))
