*** Settings ***
Library    BotFarm    project=%{BOTFARM_PROJECT}    ttl=${3}
Library    Process

*** Test Cases ***
Loses Its User
    ${bot}=    Acquire Bot
    Run Process    curl    -X    DELETE    %{BOTFARM_URL}/users/${bot.user_id}/lock
    FOR    ${i}    IN RANGE    100
        Sleep    0.3 s
    END

Fails Of That Even Where It Is Caught
    ${bot}=    Acquire Bot
    Run Process    curl    -X    DELETE    %{BOTFARM_URL}/users/${bot.user_id}/lock
    Run Keyword And Ignore Error    Sleep    3 s

Fails Of That Even Where It Ends Before That Is Known
    ${bot}=    Acquire Bot
    Run Process    curl    -X    DELETE    %{BOTFARM_URL}/users/${bot.user_id}/lock

Has Another
    ${bot}=    Acquire Bot
    Log To Console    then ${bot.login}
