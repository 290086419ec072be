*** Settings ***
Library    BotFarm    project=%{BOTFARM_PROJECT}    ttl=${3}

*** Test Cases ***
Holds Its User
    ${bot}=    Acquire Bot
    ${pid}=    Evaluate    os.getpid()
    Log To Console    worker ${pid} holds ${bot.login}
    Sleep    60 s
