# The site-packages folders of the Python that builds us. Pip's build isolation hides the target environment through
# PYTHONPATH only, and what is looked for (NVIDIA's wheels) is in that environment: hence -I and no PYTHONPATH.
function(fastllm_python_site_dirs out)
  if(NOT DEFINED FASTLLM_SITE_DIRS)
    find_package(Python 3.10 QUIET COMPONENTS Interpreter)
    set(_dirs "")
    if(Python_EXECUTABLE)
      execute_process(COMMAND ${CMAKE_COMMAND} -E env --unset=PYTHONPATH --unset=PYTHONHOME ${Python_EXECUTABLE} -I -c
        "import site, sysconfig as s; print(';'.join(dict.fromkeys([s.get_path('purelib'), s.get_path('platlib'), *site.getsitepackages()])), end='')"
        OUTPUT_VARIABLE _dirs)
    endif()
    set(FASTLLM_SITE_DIRS "${_dirs}" CACHE INTERNAL "")
  endif()
  set(${out} ${FASTLLM_SITE_DIRS} PARENT_SCOPE)
endfunction()
