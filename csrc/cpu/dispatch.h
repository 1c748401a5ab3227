#pragma once
#include <string>
#include <vector>

namespace fastllm {

std::vector<std::string> available();  // the instruction sets that this build has and this CPU runs, narrowest first
void select(const std::string& name);  // "" is the widest; throws std::invalid_argument for one that is not available
std::string selected();

}  // namespace fastllm
