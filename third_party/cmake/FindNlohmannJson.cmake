# nlohmann_json::nlohmann_json: an installed CMake package (Debian's nlohmann-json3-dev), else the header folder inside
# the PyPI package `nlohmann-json`, which pip installs as a build requirement.
find_package(nlohmann_json CONFIG QUIET)
if(NOT TARGET nlohmann_json::nlohmann_json)
  find_package(Python 3.10 QUIET COMPONENTS Interpreter)
  if(Python_EXECUTABLE)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c "import importlib.util as u; s = u.find_spec('nlohmann_json'); print(list(s.submodule_search_locations)[0] if s else '', end='')"
      OUTPUT_VARIABLE _json_pkg ERROR_QUIET)
  endif()
  find_path(NLOHMANN_JSON_INCLUDE_DIR nlohmann/json.hpp HINTS ${_json_pkg}/include)
  if(NLOHMANN_JSON_INCLUDE_DIR)
    add_library(nlohmann_json::nlohmann_json INTERFACE IMPORTED)
    target_include_directories(nlohmann_json::nlohmann_json SYSTEM INTERFACE ${NLOHMANN_JSON_INCLUDE_DIR})
  endif()
endif()
if(TARGET nlohmann_json::nlohmann_json)
  set(NlohmannJson_FOUND TRUE)
elseif(NlohmannJson_FIND_REQUIRED)
  message(FATAL_ERROR "nlohmann/json.hpp not found: apt-get install nlohmann-json3-dev, or pip install nlohmann-json")
endif()
